"""Checks of constructor arguments, each of which names the argument and its value."""

import math
from collections.abc import Collection


def require_positive(**values: int) -> None:
    """Raise ValueError unless all are at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def require_not_negative(**values: float) -> None:
    """Raise ValueError unless all are finite and at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number, 0 or more")


def require_share(**values: float) -> None:
    """Raise ValueError unless all are at least 0 and less than 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be a share, 0 to less than 1")


def require_k(k: int, n_features: int) -> None:
    """Raise ValueError for a number of matches per token that no dictionary of this size has."""
    if not 1 <= k <= n_features:
        raise ValueError(f"k={k} is out of range: it must be 1 to n_features={n_features}")


def require_choice(*, of: Collection[str], **values: str) -> None:
    """Raise ValueError unless all are among the names in `of`."""
    for name, value in values.items():
        if value not in of:
            raise ValueError(f"{name}={value!r} is none of {', '.join(of)}")
