"""Calibration: the last checkpoint and validation have the exact thresholds."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, TopKSAE
from lightning_sae.callbacks import CalibrateThresholds
from tests.helpers.superposition import superposition

K = 3


def tokens(count: int, seed: int) -> Tensor:
    """Return tokens of which no two are equal: not all of those at a threshold could be chosen."""
    noise = torch.randn(count, 8, generator=torch.Generator().manual_seed(1000 + seed))
    return superposition(count, 8, n_features=16, seed=seed) + 0.01 * noise


TRAIN = torch.cat([tokens(128, seed) for seed in range(20)])
HELD_OUT = tokens(1000, seed=-1)


def fit(sae: SparseAutoencoder, folder: Path, *callbacks: pl.Callback) -> Path:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)
    trainer = pl.Trainer(
        max_steps=20,
        callbacks=[checkpoint, *callbacks],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    train = DataLoader(TensorDataset(TRAIN), batch_size=128)
    trainer.fit(sae, train, DataLoader(TensorDataset(HELD_OUT), batch_size=100))
    return folder / "last.ckpt"


@pytest.mark.parametrize("kind", ["mutual", "feature"])
def test_the_last_checkpoint_keeps_to_the_budget(kind: str, tmp_path: Path, caplog):
    torch.manual_seed(0)
    sae: SparseAutoencoder
    if kind == "mutual":
        sae = MutualChoiceSAE(8, 24, K)
    else:
        sae = FeatureChoiceSAE(8, 24, K, mutual_choice_share=0, max_density=0.3)
    fired = type(sae).load_from_checkpoint(fit(sae, tmp_path))  # without being asked to
    assert (fired.encode(HELD_OUT) > 0).sum().item() == pytest.approx(K * 1000, rel=0.01)
    told = r"on 1,000 held-out tokens, which had \d\.\d\d matches each before and have 3\.00 now"
    assert re.search(told, caplog.text)


def test_only_as_many_tokens_as_asked_for(tmp_path: Path):
    sae = MutualChoiceSAE(8, 24, K)
    fit(sae, tmp_path, CalibrateThresholds(tokens=150))
    sae.eval()
    assert (sae.encode(HELD_OUT[:200]) > 0).sum() == K * 200  # in whole batches
    assert (sae.encode(HELD_OUT) > 0).sum() != K * 1000  # one's own takes the place of the default


def test_an_architecture_without_thresholds_is_left_alone(tmp_path: Path):
    torch.manual_seed(0)
    with_callback, without = TopKSAE(8, 24, K), TopKSAE(8, 24, K)
    without.load_state_dict(with_callback.state_dict())
    fit(with_callback, tmp_path / "a", CalibrateThresholds())
    fit(without, tmp_path / "b")
    assert torch.equal(with_callback.W_dec, without.W_dec)


def test_tokens_must_be_positive():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        CalibrateThresholds(tokens=0)
