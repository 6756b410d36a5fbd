"""Files of tensors that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import get_ident

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Save tensors to a safetensors file, with the permissions that other new files have.

    It is written beside its place, under a name of this process and thread, and then moved there.

    Args:
        tensors: By name; of any device, layout and shared memory.
        path: What to write, or to replace.
        metadata: Texts that the file is to hold too.

    Raises:
        OSError: If it cannot be written; what was there before is intact.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.partial")
    # Clones, because the columns of one tensor share its memory, which safetensors refuses.
    clones = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        save_file(clones, temporary, metadata=metadata or None)
        temporary.chmod(permissions)  # safetensors lets nobody else read what it writes
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, say
        raise OSError(f"cannot write '{path}': {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
