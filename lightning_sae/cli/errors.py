"""Mistakes of the user, and ranks that are gone, told in one line; bugs with their traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonargparse
import lightning
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["one_line", "one_line_errors"]

PACKAGE = Path(__file__).parents[1]
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
GLOO = ("/gloo/", "caused pair closure")
"""What its errors contain, which have no class of their own."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line if the error is no bug, else let it pass."""
    try:
        yield
    except Exception as error:
        told = _about_other_ranks(error) or _about_a_schedule(error) or _about_the_input(error)
        if told is None:
            raise
        sys.exit(one_line(str(told)))


def _about_other_ranks(error: BaseException) -> str | None:
    """Return what to say if it was raised because another process did not answer."""
    if isinstance(error, dist.DistError) or any(words in str(error) for words in GLOO):
        return f"another process of the run has ended, or hangs: {error}".splitlines()[0]
    return None


def _about_a_schedule(error: BaseException) -> str | None:
    """Return what to say if a schedule divides by a length of zero, which torch does not check."""
    (*_, (frame, _)) = traceback.walk_tb(error.__traceback__)
    schedule = frame.f_locals.get("self")
    if isinstance(error, ZeroDivisionError) and isinstance(schedule, LRScheduler):
        return f"lr_scheduler={type(schedule).__name__} has a length of 0: {error}"
    return None


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
