"""The data that an SAE was trained on, from what its files note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lightning_sae.data import ActivationDataModule
from lightning_sae.data.provenance import ORDER

__all__ = ["recorded_settings"]

MODEL: Final = frozenset({"model_name", "model_revision", "layer", "model_dtype"})
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
