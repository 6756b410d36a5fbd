"""Names for what is being written, by which the next one knows what a killed process left."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["left_behind", "temporary_of"]

DAY: Final = 24 * 60 * 60.0
HOST: Final = platform.node().replace("-", "_") or "host"


def temporary_of(target: Path) -> Path:
    """Return where to write what is to become a file or folder: a name that no one else uses."""
    unique = f"{HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f"{_prefix(target)}{unique}.tmp")


def _prefix(target: Path) -> str:
    # Lightning counts every file with `hpc_ckpt_` in its name among those it may resume from.
    return f"{target.name.replace('_', '-')}."


def left_behind(target: Path) -> Iterator[Path]:
    """Yield what saves to a name left that were killed on this host, or a day ago anywhere."""
    prefix = _prefix(target)
    for path in target.parent.iterdir():
        if not (path.name.startswith(prefix) and path.suffix == ".tmp"):
            continue
        host, process, *_ = (*path.name.removeprefix(prefix).split("-"), "")
        with suppress(OSError):  # someone else has just removed it
            killed = host == HOST and process.isdecimal() and not _is_running(int(process))
            if killed or time.time() - path.stat().st_mtime > DAY:
                yield path


def _is_running(process: int) -> bool:
    if os.name != "posix":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is someone else's
        return True
    return True
