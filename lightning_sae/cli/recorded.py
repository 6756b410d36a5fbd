"""The data that an SAE was trained on, from what its files note."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.checks import UsageError
from lightning_sae.data import ActivationDataModule, StreamDataModule
from lightning_sae.data.provenance import ORDER
from lightning_sae.sae import SparseAutoencoder

__all__ = ["held_out_activations", "note_figures", "recorded_activations", "recorded_settings"]

MODEL: Final = frozenset({"model_name", "model_revision", "layer", "site", "model_dtype"})
NOTED: Final = MODEL | (set(ActivationDataModule.place) - ORDER)
"""What a record is believed. Whoever wrote the file may have written anything else beside it, a
folder to write to, say."""


def recorded_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `ActivationDataModule` that a record notes.

    Args:
        record: As `SparseAutoencoder.record`, from a file of anyone's.
    """
    trained_on = record.get("trained_on")
    found = trained_on if isinstance(trained_on, dict) else {}
    return {name: value for name, value in found.items() if name in NOTED}


def recorded_activations(
    record: Mapping[str, Any], tokens: int, said: Mapping[str, Any] = MappingProxyType({})
) -> Tensor | None:
    """Return held-out activations of what an SAE was trained on; None, and why, if none are there.

    Args:
        record: As `SparseAutoencoder.record`.
        tokens: How many, at most.
        said: What counts in place of the record, by the arguments of `ActivationDataModule`.

    Returns:
        Shape (tokens, d_model).
    """
    settings = {**recorded_settings(record), **said}
    if not {"model_name", "layer", "text"} <= settings.keys():
        rank_zero_warn("What the SAE was trained on is not known: no real activations are read")
        return None
    # Twice as many, since special tokens are none of them; what is not needed is not read.
    most = 2 * tokens + settings.get("context_length", 128)
    try:
        return held_out_activations(
            ActivationDataModule(**settings, validation_tokens=most), tokens
        )
    except (UsageError, OSError) as error:
        rank_zero_warn(
            f"What the SAE was trained on cannot be read, so no real activations: {error}"
        )
        return None


def note_figures(sae: SparseAutoencoder, tokens: int) -> None:
    """Validate an SAE on what it was trained on, and have its record note the figures.

    Args:
        sae: One whose record says on what.
        tokens: How many, about, for the language model's loss too.
    """
    data = ActivationDataModule(**recorded_settings(sae.record), validation_tokens=tokens)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LossRecoveredCallback(tokens)],
    )
    trainer.validate(sae, data, verbose=False)


def held_out_activations(data: StreamDataModule, tokens: int) -> Tensor:
    """Return the first activations of a validation, `tokens` at most, (tokens, d_model)."""
    found: list[Tensor] = []
    for batch in data.val_dataloader():
        found.append(batch["activations"])
        if sum(map(len, found)) >= tokens:
            break
    return torch.cat(found)[:tokens]
