"""A folder that one run at a time may write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_sae.checks import UsageError

__all__ = ["hold"]


@contextmanager
def hold(folder: Path, key: str) -> Iterator[None]:
    """Keep other runs from holding the same folder, until the process ends at the latest.

    The system's lock on the folder itself leaves no file behind, and `kill -9` lifts it. Where
    there are no such locks, on Windows and on some network file systems, nothing is kept.

    Args:
        folder: One that exists.
        key: The setting that names it, for the error message.

    Raises:
        UsageError: If another run holds it.
        OSError: If it cannot be opened.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{key}={folder}: another run is writing to this folder, name another"
            ) from None
        except OSError:  # of the file system, which has no such locks
            pass
        yield
    finally:
        os.close(descriptor)
