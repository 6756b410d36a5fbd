"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_sae.checks import UsageError

__all__ = ["AtomicCheckpointIO", "check_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and then gives it its name, which cannot half happen.

    Whatever interrupts it, `kill -9`, a full disk or a power failure, the file of that name is
    the earlier one or the new one, complete. A killed process can leave one `NAME.tmp`, which the
    next save to that name overwrites. Lightning's own way is not atomic where the folder for
    temporary files is on another file system.

    A file is read only if it is as it was written.

    URLs (`s3://...`) are written and read as Lightning does.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint that `check_checkpoint` finds intact, if it is a file.

        Raises:
            ValueError: It is damaged.
        """
        if "://" not in str(path):
            check_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)

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
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch hides some of the first in the second
            reason = error.__context__ if isinstance(error, RuntimeError) else error
            _discard(temporary)
            raise OSError(
                f"the checkpoint {target} cannot be written: {reason or error}"
            ) from error


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file through, running nothing that is in it.

    Returns:
        What is in it, tensors only as far as they are looked at.

    Raises:
        ValueError: It is no checkpoint of an SAE, or not as it was written: cut short, a bit
            flipped (which torch by itself does not notice), or made to unpack to more than it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            intact = unpacked <= Path(path).stat().st_size and archive.testzip() is None
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if intact else {}
        complete = "loops" in found and "W_dec" in found["state_dict"]
    except Exception:  # there is no end to what broken files raise
        complete = False
    if not complete:
        raise UsageError(f"ckpt_path={path} is no checkpoint of an SAE, or is damaged")
    return found


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
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # its folder cannot be written to either
        return
