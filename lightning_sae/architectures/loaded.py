"""Trained SAEs of whatever architecture, found by what their files say."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import isabstract
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lightning_sae.checkpoint_format import is_sae, require_one
from lightning_sae.checkpoint_io import open_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.pretrained import CONFIG, config_of, may_be_repository
from lightning_sae.quickstart import packaged_sae
from lightning_sae.sae import SparseAutoencoder

__all__ = ["load"]


def load(
    path: str | Path, *, revision: str | None = None, map_location: str | torch.device = "cpu"
) -> SparseAutoencoder:
    """Return a trained SAE, ready for inference: of its own class, and in `eval()` mode.

    Args:
        path: A checkpoint, a folder that `save_pretrained` wrote, or the id of a repository on the
            Hugging Face hub that has such files. Nothing in them runs. Or one of those that ship
            with the package: `quickstart/standard`, `topk`, `mutual_choice` or `feature_choice`.
        revision: Branch, tag or commit on the hub. Default: the main branch.
        map_location: The device it is to be on.

    Raises:
        UsageError: If there is none, it is damaged, or its class is not known.
    """
    path = packaged_sae(path)
    path = Path(path).expanduser() if Path(path).expanduser().exists() else str(path)
    if Path(path).is_file():
        found = open_checkpoint(path)
        require_one(found, path)
        if not is_sae(found["state_dict"]):
            raise UsageError(f"{path} is no checkpoint of an SAE")
        architecture = found.get("architecture", "")
        return _kind(architecture, path).load_from_checkpoint(path, map_location).eval()
    if not (Path(path).is_dir() or may_be_repository(path)):
        raise UsageError(f"{path}: there is no such file or folder")
    try:
        folder = path if Path(path).is_dir() else _downloaded(str(path), revision)
        kind = _kind(config_of(folder)["architecture"], path)
        return kind.from_pretrained(path, revision=revision, map_location=map_location)
    except (HFValidationError, HfHubHTTPError, FileNotFoundError) as error:
        raise UsageError(
            f"{path} is no file or folder, nor is it found on the hub: {error}"
        ) from error


def _downloaded(repository: str, revision: str | None) -> Path:
    """Return the folder in the hub's cache that has the configuration of a repository."""
    return Path(hf_hub_download(repository, CONFIG, revision=revision)).parent


def _kind(architecture: Any, path: str | Path) -> type[SparseAutoencoder]:
    """Return the class of an architecture: one of this package's, or imported by now."""
    kinds = {kind.__name__: kind for kind in _below(SparseAutoencoder) if not isabstract(kind)}
    if architecture not in kinds:
        raise UsageError(
            f"{path} holds a {architecture or 'module without a name'}, which is none of "
            f"{', '.join(sorted(kinds))}: import its class first"
        )
    return kinds[architecture]


def _below(kind: Any) -> Iterator[type[SparseAutoencoder]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
