"""What tells a model's weights from all others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["commit_of", "model_fingerprint", "weights_fingerprint"]


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
    digest = hashlib.sha256()
    if Path(path).is_dir():
        for file in sorted([*Path(path).glob("*.safetensors"), Path(path) / "config.json"]):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        digest.update(f"{path}@{commit_of(path, revision)}".encode())
    return digest.hexdigest()[:16]


def commit_of(path: str, revision: str) -> str:
    """Return the commit that a revision of a hub id is in the hub's own cache.

    Args:
        path: Hub id.
        revision: Branch, which may move, or tag; it is returned if the cache does not have it.
    """
    from huggingface_hub import try_to_load_from_cache  # of transformers' own dependencies
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # a name that is no hub id, of a model from elsewhere
        return revision
    # A file lies in a folder named after its commit.
    return Path(config).parent.name if isinstance(config, str) else revision
