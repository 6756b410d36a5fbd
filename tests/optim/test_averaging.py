"""Lightning's callbacks that average weights, with modules that count."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader

from lightning_sae import MutualChoiceSAE, SparseAutoencoder
from tests.helpers.superposition import superposition

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
STEPS, TOKENS = 12, 64


def fit(folder: Path, averaging: Any, start: Path | None = None) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, 3, dead_after_tokens=2 * TOKENS)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        val_check_interval=3,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[
            *([averaging] if averaging else []),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = superposition(4 * STEPS * TOKENS, 8, n_features=16, seed=0)
    loaders = DataLoader(x, batch_size=TOKENS), DataLoader(x[:TOKENS], batch_size=TOKENS)
    trainer.fit(sae, *loaders, ckpt_path=start, weights_only=True)
    return sae


@pytest.mark.parametrize(
    "make",
    [
        WeightAveraging,
        EMAWeightAveraging,
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=5),
        lambda: EMAWeightAveraging(update_starting_at_step=6),
    ],
    ids=["equally", "exponentially", "every fifth step", "late"],
)
def test_weights_are_averaged_and_counts_are_counts(make, tmp_path: Path):
    plain, averaged = fit(tmp_path / "plain", None), fit(tmp_path / "averaged", make())
    assert averaged.tokens_seen == STEPS * TOKENS
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(averaged.named_buffers())[name], buffer), name
    assert not torch.equal(averaged.encoder.weight, plain.encoder.weight)
    saved = MutualChoiceSAE.load_from_checkpoint(tmp_path / f"averaged/step={STEPS}.ckpt")
    assert torch.equal(saved.encoder.weight, averaged.encoder.weight)
    assert saved.tokens_seen == STEPS * TOKENS
    norms = saved.decoder.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_resumed_run_averages_on(tmp_path: Path):
    """Up to the data, which a loader without a state begins anew."""
    fit(tmp_path, EMAWeightAveraging())
    sae = fit(tmp_path / "resumed", EMAWeightAveraging(), tmp_path / "step=8.ckpt")
    assert sae.tokens_seen == STEPS * TOKENS
