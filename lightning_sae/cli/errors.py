"""What ends the command in one line: mistakes of the user, and processes and disks that are gone.

A mistake of the user is a `UsageError`. What other libraries raise about settings is made one
where they are given the settings (`refusals`), or is an exception that its library has for such
(Lightning's `MisconfigurationException`). Any other error is a bug, and its traceback is wanted.
"""

from __future__ import annotations

import errno
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sae.checks import UsageError

__all__ = ["one_line", "one_line_errors", "refusals"]

UNTOLD: Final = (
    "Does not validate",
    "Subtypes",
    "Errors",
    "Expected a <class 'NoneType'>",
    "Given value type",
    "Expected a path but",
    "Not a valid subclass",
    "Subclass types",
    "a class path (str)",
    "a dict with",
)
"""How lines of jsonargparse's messages begin that tell about its own workings."""
CALLABLE: Final = re.compile(
    r"Type .+ expects a function or a callable class: |\. Got value: Namespace\(.*"
)
"""What jsonargparse puts around the reason why an optimizer, say, cannot be made."""
GLOO: Final = ("/gloo/", "caused pair closure")
"""What its errors contain, which have no class of their own."""
NO_METRIC: Final = "Early stopping conditioned on metric"
"""How the RuntimeError begins that EarlyStopping raises for a name that nothing is logged by."""
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a disk answers to a write, when no one knows the name of the file any more."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line if the error is no bug, else let it pass."""
    in_threads = threading.excepthook
    threading.excepthook = lambda args: None if _is_full(args.exc_value) else in_threads(args)
    try:
        yield
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        sys.exit(one_line(told))
    finally:
        threading.excepthook = in_threads


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Make a mistake of the user of what a library raises when it is given a setting.

    Args:
        kinds: What it raises to refuse one.

    Raises:
        UsageError: In place of these.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(str(error)) from error


def one_line(message: str) -> str:
    """Return what a message says about the user's input, without the parser's own workings.

    What jsonargparse says of a key inside others, in lines further and further in, becomes one
    line about the whole dotted key.
    """
    told: dict[str, None] = {}
    around: dict[int, str] = {}  # keys, by how far in
    whole = "Problem with given class_path" in message  # of which a part is what matters
    for line in CALLABLE.sub("", message).splitlines():
        words = line.strip(" -").rstrip(":")
        if not words or words.startswith(UNTOLD) or (whole and words.startswith("Given value")):
            continue
        path = ".".join(around.values())
        key = re.fullmatch(r'Parser key "(.+)"', words)
        if key is not None:
            depth = len(line) - len(line.lstrip(" -"))
            around = {far: name for far, name in around.items() if far < depth} | {depth: key[1]}
            _drop_last(told, "Problem with given class_path")
            _drop_last(told, "Parser key")
            words = f'Parser key "{".".join(around.values())}"'
        elif path and words.startswith(("Option '", "unrecognized arguments: --")):
            words = re.sub("('|--)", rf"\g<1>{path}.", words, count=1)
            told.pop(f'Parser key "{path}"', None)
        told[words] = None
    return ": ".join(["lightning_sae: error", *told])


def _drop_last(told: dict[str, None], beginning: str) -> None:
    if told and next(reversed(told)).startswith(beginning):
        told.popitem()


def _told(error: Exception) -> str | None:
    """Return what to say of an error that is no bug."""
    if isinstance(error, dist.DistError) or any(words in str(error) for words in GLOO):
        return f"another process of the run has ended, or hangs: {error}".splitlines()[0]
    if isinstance(error, RuntimeError) and str(error).startswith(NO_METRIC):
        return str(error)
    if isinstance(error, UsageError | MisconfigurationException):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or _is_full(error)):
        return str(error)
    if _is_full(error.__cause__):  # of a logger, to which Lightning says that the value is wrong
        return str(error.__cause__)
    return None


def _is_full(error: BaseException | None) -> bool:
    """Return whether a disk takes no more: TensorBoard's thread finds out, and the run is told."""
    return isinstance(error, OSError) and error.errno in FULL
