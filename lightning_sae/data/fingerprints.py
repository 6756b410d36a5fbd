"""What tells a model's weights from all others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["model_fingerprint", "weights_fingerprint"]


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return what tells these weights from all others, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(path: str, revision: str) -> str:
    """Return what tells a model's weights from all others, as 16 hexadecimal digits.

    Args:
        path: Folder (then its weight files are hashed) or hub id (then the commit counts, which is
            that of the configuration in the hub's own cache, whatever branch or tag it was got by).
        revision: Revision asked for.
    """
    from huggingface_hub import try_to_load_from_cache  # of transformers' own dependencies

    digest = hashlib.sha256()
    if Path(path).is_dir():
        for file in sorted([*Path(path).glob("*.safetensors"), Path(path) / "config.json"]):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        # A file lies in a folder named after its commit: `revision` may be a branch that moves.
        config = try_to_load_from_cache(path, "config.json", revision=revision)
        commit = Path(config).parent.name if isinstance(config, str) else revision
        digest.update(f"{path}@{commit}".encode())
    return digest.hexdigest()[:16]
