"""A tiny SAE of a tiny model, and its data."""

from pathlib import Path

import datasets
import pytest
import torch

from lightning_sae import ActivationDataModule, TopKSAE
from tests.data import tiny


def trained_in(folder: Path, patch: pytest.MonkeyPatch) -> tuple[TopKSAE, ActivationDataModule]:
    """Return an SAE that has seen a batch, notes of what, and that; all files are in the folder."""
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    datasets.disable_progress_bars()
    files = tiny.save_model(folder / "model"), tiny.save_text(folder / "text.jsonl")
    data = ActivationDataModule(**tiny.arguments(*files))
    torch.manual_seed(0)
    sae = TopKSAE(tiny.D_MODEL, 24, 3)
    sae.loss(next(iter(data.train_dataloader()))["activations"])
    sae.record = {"trained_on": data.describe(), "measured": {"fvu": 0.5}}
    return sae.eval(), data
