"""Keep activations on disk, so that a second run need not compute them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.tensor_files import save_tensors

__all__ = ["ActivationCache", "model_fingerprint", "weights_fingerprint"]


@dataclass(frozen=True)
class ActivationCache:
    """A reader of activations that remembers on disk what it has read.

    One file per call, named by the inputs it answers for: data, seed, lengths and batch sizes
    need no further check, and ranks need not agree on anything. A file appears under its name
    only when complete. Disk needed: tokens x d_model x bytes of the dtype, for each epoch anew.

    Args:
        read: Token ids (contexts, length), or images (images, 3, height, width), to activations
            (inputs, length, d_model).
        folder: Where the files are; whatever else decides the values belongs in its name.
        device: Where to put activations that come from the disk.
        shape: Returns the shape of what is read of inputs.
        dtype: What the model computes in.
    """

    read: Callable[[Tensor], Tensor]
    folder: Path
    device: torch.device
    shape: Callable[[Tensor], tuple[int, ...]]
    dtype: torch.dtype

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the activations of these inputs, (inputs, length, d_model).

        Raises:
            UsageError: If their file is damaged, holds another shape or type, or cannot be written.
        """
        key = inputs.cpu().contiguous()
        digest = hashlib.sha256(repr(tuple(key.shape)).encode() + key.numpy().tobytes())
        file = self.folder / f"{digest.hexdigest()}.safetensors"
        if file.exists():
            return self._load(file, self.shape(inputs))
        activations = self.read(inputs)
        self._save(activations, file)
        return activations

    def _load(self, file: Path, shape: tuple[int, ...]) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file, device=str(self.device))["activations"]
        except (SafetensorError, KeyError, OSError) as error:
            raise UsageError(
                f"cache_dir: {file} is damaged ({error}); delete it, and it is computed again"
            ) from error
        # Some models of sixteen bits keep their residual stream in float32.
        if found.shape != shape or found.dtype not in {self.dtype, torch.float32}:
            raise UsageError(
                f"cache_dir: {file} holds {found.dtype} of shape {tuple(found.shape)} instead of "
                f"{self.dtype} of shape {shape}; delete it, and it is computed again"
            )
        return found

    def _save(self, activations: Tensor, file: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir: cannot make '{self.folder}': {error.strerror}") from error
        try:
            save_tensors({"activations": activations}, file)
        except OSError as error:
            raise UsageError(f"cache_dir: {error}") from error


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
