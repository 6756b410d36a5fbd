"""Trained SAEs by what a command line calls them: this package's own, or another library's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from lightning_sae.architectures import load
from lightning_sae.cli.recorded import held_out_activations, recorded_activations
from lightning_sae.data import StreamDataModule
from lightning_sae.interop import FoldedSAE, is_foreign, load_foreign, unfold
from lightning_sae.sae import SparseAutoencoder

__all__ = ["imported", "trained"]


def trained(
    path: str, device: str | torch.device = "cpu", said: Mapping[str, Any] = MappingProxyType({})
) -> SparseAutoencoder:
    """Return the SAE that a path names, ready for inference.

    Args:
        path: What `lightning_sae.load` takes, or `lightning_sae.interop.load_foreign`.
        device: Where it is to be.
        said: What the user says of the activations that it is for, as `imported` takes it.

    Raises:
        UsageError: If there is none, or it is damaged.
    """
    if is_foreign(path):
        return imported(load_foreign(path), said=said).to(device)
    return load(path, map_location=device)


def imported(
    folded: FoldedSAE,
    k: int | None = None,
    data: StreamDataModule | None = None,
    tokens: int = 16_384,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> SparseAutoencoder:
    """Return the SAE of another library as one of this package's, ready for inference.

    Args:
        folded: As `lightning_sae.interop.load_foreign` returns it.
        k: As `lightning_sae.interop.unfold` takes it.
        data: The activations it is for. Default: what its files say, if anything.
        tokens: How many of these its mean and scale are measured on.
        said: What counts in place of what its files say, by the arguments of
            `ActivationDataModule`.

    Raises:
        UsageError: If it is not for these activations, or of a kind that is not ours.
    """
    if data is None:
        return unfold(folded, k, recorded_activations(folded.record, tokens, said))
    return unfold(folded, k, held_out_activations(data, tokens))
