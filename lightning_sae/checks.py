"""Checks of constructor arguments, each of which names the argument and its value."""

import math
from collections.abc import Collection


class UsageError(ValueError):
    """What was asked for cannot be: the message, one line, names the setting and its value.

    The command line prints it and exits; any other error is a bug, and keeps its traceback.
    """


def require_at_least(least: int, **values: int) -> None:
    """Raise UsageError unless no value is smaller than `least`, or more than 64 bits hold."""
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name}={value} must be at least {least}")
        if value >= 2**63:
            raise UsageError(f"{name}={value} must be less than 2**63")


def require_positive(**values: int) -> None:
    """Raise UsageError unless all are at least 1."""
    require_at_least(1, **values)


def require_not_negative(**values: float) -> None:
    """Raise UsageError unless all are finite and at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name}={value} must be a finite number, 0 or more")


def require_share(**values: float) -> None:
    """Raise UsageError unless all are at least 0 and less than 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value} must be a share, 0 to less than 1")


def require_k(k: int, n_features: int) -> None:
    """Raise UsageError for a number of matches per token that no dictionary of this size has."""
    if not 1 <= k <= n_features:
        raise UsageError(f"k={k} is out of range: it must be 1 to n_features={n_features}")


def require_choice(*, of: Collection[str], **values: str) -> None:
    """Raise UsageError unless all are among the names in `of`."""
    for name, value in values.items():
        if value not in of:
            raise UsageError(f"{name}={value!r} is none of {', '.join(of)}")
