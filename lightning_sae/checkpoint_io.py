"""Checkpoints that are whole or not there."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_sae.checkpoint_format import FORMAT, format_of, is_sae, require_one, upgrade
from lightning_sae.checks import UsageError
from lightning_sae.temporary import left_behind, temporary_of

__all__ = [
    "AtomicCheckpointIO",
    "in_present_format",
    "open_checkpoint",
    "read_checkpoint",
    "require_intact",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and then gives it its name, which cannot half happen.

    Whatever interrupts it, `kill -9`, a full disk or a power failure, the file of that name is
    the earlier one or the new one, complete. A killed process can leave one `NAME.*.tmp`, which
    the next save to that name removes. Several processes may save to one name: the last one wins.
    Lightning's own way is not atomic where the folder for temporary files is on another file
    system.

    A file is read only if it is as it was written. Checkpoints of any module are welcome; those of
    SAEs in an earlier format are read as if they had the present one.

    URLs (`s3://...`) are written and read as Lightning does.
    """

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint, in the present format.

        Args:
            path: What to load.
            map_location: Where tensors go, as `torch.load` takes it. Default: the CPU.
            weights_only: Whether to refuse a file that could run code. Only False does not.

        Raises:
            UsageError: It is damaged, or of a later format.
            FileNotFoundError: It does not exist.
        """
        if "://" not in str(path):
            require_intact(path)
        found: dict[str, Any] = super().load_checkpoint(
            path, map_location, weights_only=weights_only is not False
        )
        upgrade(found)
        return found

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: Where to save it; missing folders are made.
            storage_options: Not for this class; None.

        Raises:
            OSError: It cannot be written; an earlier file of that name is intact.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = temporary_of(target)
        try:
            with _disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
                _sync_folder(target.parent)
        finally:
            _discard(temporary)
        for left in left_behind(target):
            _discard(left)


def read_checkpoint(
    path: str | Path, map_location: str | torch.device | Callable[..., Any] = "cpu"
) -> dict[str, Any]:
    """Return what is in the checkpoint of an SAE, in the present format; nothing in it runs.

    Args:
        path: A file or a URL.
        map_location: Where tensors go, as `torch.load` takes it.

    Raises:
        UsageError: It is damaged, of a later format, or not of an SAE.
        FileNotFoundError: It does not exist.
    """
    found = AtomicCheckpointIO().load_checkpoint(path, map_location)
    require_one(found, path)
    if not is_sae(found["state_dict"]):
        raise UsageError(f"{path} is no checkpoint of an SAE")
    return found


def in_present_format(path: Any) -> Any:
    """Return what to load in place of a checkpoint: itself, or in memory what upgrading made of it.

    Args:
        path: A file, a URL, or an open file; the last two are taken to be of the present format.

    Raises:
        UsageError: It is damaged, of a later format, or not of an SAE.
        FileNotFoundError: It does not exist.
    """
    if not isinstance(path, str | Path) or "://" in str(path):
        return path
    path = Path(path).expanduser()
    if format_of(open_checkpoint(path)) == FORMAT:
        return path
    upgraded = io.BytesIO()
    torch.save(read_checkpoint(path), upgraded)
    upgraded.seek(0)
    return upgraded


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what is in a checkpoint, in its own format, without reading all of it.

    Nothing in it runs. Tensors are read when they are looked at; whether they are as they were
    written is not known.

    Raises:
        UsageError: It is no checkpoint, or is cut short.
        FileNotFoundError: It does not exist.
    """
    with _told_if_damaged(path):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found["state_dict"], dict):
            raise TypeError("a state dict is one")
        return dict(found)


def require_intact(path: str | Path) -> None:
    """Read a file through.

    Raises:
        UsageError: It is not as it was written: cut short, a bit flipped (which torch by itself
            does not notice), or made to unpack to more than it is.
        FileNotFoundError: It does not exist.
    """
    with _told_if_damaged(path), zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("a checksum is wrong")


@contextmanager
def _told_if_damaged(path: str | Path) -> Iterator[None]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("compressed, which torch never does")
        yield
    except FileNotFoundError:
        raise
    except Exception:  # there is no end to what broken files raise
        raise UsageError(f"{path} is no checkpoint, or is damaged") from None


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Say of an error of the disk which checkpoint could not be written.

    Raises:
        OSError: In place of one, and of the RuntimeError in which torch hides one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        told = f"the checkpoint cannot be written: {reason.strerror}"
        raise OSError(reason.errno, told, str(target)) from error


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlive a power failure, where the system can."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _discard(temporary: Path) -> None:
    """Delete a file, or not."""
    with suppress(OSError):  # its folder cannot be written to either
        temporary.unlink(missing_ok=True)
