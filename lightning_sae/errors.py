"""Mistakes of the user told in one line; bugs with their traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonargparse
import lightning
import torch

__all__ = ["one_line", "one_line_errors"]

PACKAGE = Path(__file__).parent
CHECKERS = tuple(Path(module.__path__[0]) for module in (jsonargparse, lightning, torch.optim))
"""Libraries that refuse settings, and do nothing else that a user has no part in."""
UNTOLD = (
    "Does not validate",
    "Subtypes",
    "Errors",
    "Expected a <class 'NoneType'>",
    "Given value type",
    "Expected a path but",
    "Not a valid subclass",
    "Subclass types",
)
"""How lines of jsonargparse's messages begin that tell about its own workings."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line if the error is about the user's input, else let it pass."""
    try:
        yield
    except Exception as error:
        told = _about_the_input(error)
        if told is None:
            raise
        sys.exit(one_line(str(told)))


def _about_the_input(error: BaseException) -> BaseException | None:
    """Return the error, or the one behind it, if it was raised to tell the user of their input.

    Such are those that this package raises; else those that the libraries raise which check what
    the user sets; else files and folders. Anything else is a bug, and its traceback is wanted.
    """
    links = [error]
    while (cause := links[-1].__cause__) is not None:  # jsonargparse wraps what constructors raise
        links.append(cause)
    for folders in ((PACKAGE,), CHECKERS):
        for link in reversed(links):
            last = traceback.extract_tb(link.__traceback__)[-1]
            deliberate = (last.line or "").startswith("raise ")
            if deliberate and any(Path(last.filename).is_relative_to(folder) for folder in folders):
                return link
    return error if isinstance(error, OSError) else None


def one_line(message: str) -> str:
    """Return what a message says about the user's input, without the parser's own workings."""
    lines = (line.strip(" -").rstrip(":") for line in message.splitlines())
    told = dict.fromkeys(line for line in lines if line and not line.startswith(UNTOLD))
    return ": ".join(["lightning_sae: error", *told])
