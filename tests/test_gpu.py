"""A GPU trains what a CPU trains.

Only where there is a GPU; elsewhere Triton's interpreter and compilers stand in for it
(`sparse/test_kernels.py`).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_sae import (
    ChunkedAdam,
    FeatureChoiceSAE,
    MutualChoiceSAE,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.data import ActivationDataModule
from tests.data import tiny
from tests.helpers.superposition import superposition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

D_MODEL, N_FEATURES, K, TOKENS = 64, 1024, 8, 512
ACCELERATOR, STEPS = "gpu", 8

feature_choice = partial(
    FeatureChoiceSAE, mutual_choice_share=0, zipf_exponent=1.0, zipf_offset=2.0
)
MAKE = {
    "standard": partial(StandardSAE, D_MODEL, N_FEATURES, 0.5),
    "topk": partial(TopKSAE, D_MODEL, N_FEATURES, K),
    "mutual": partial(MutualChoiceSAE, D_MODEL, N_FEATURES, K, dead_after_tokens=2 * TOKENS),
    "by norm": partial(MutualChoiceSAE, D_MODEL, N_FEATURES, K, importance="token_norm"),
    "feature": partial(feature_choice, D_MODEL, N_FEATURES, K),
    "per batch": partial(feature_choice, D_MODEL, N_FEATURES, K, per_batch=True, min_matches=0.5),
}
ADAMS = {"Adam": partial(torch.optim.Adam, fused=True), "ChunkedAdam": ChunkedAdam}


def losses(
    make: Callable[[], SparseAutoencoder], adam: Callable[..., torch.optim.Optimizer], device: str
) -> list[float]:
    torch.manual_seed(0)
    sae = make()
    sae.to(device)
    optimizer = adam(sae.parameters(), lr=1e-3)
    sae.leave_gradients_in_parts(adam is ChunkedAdam)
    found = []
    for step in range(30):
        loss, _ = sae.loss(superposition(TOKENS, D_MODEL, 256, seed=step).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("adam", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_losses_are_those_of_a_cpu(make, adam):
    # Other orders of adding up: now and then, an affinity falls on the other side of a threshold.
    assert losses(make, adam, "cuda") == pytest.approx(losses(make, adam, "cpu"), rel=1e-3)


@pytest.mark.parametrize("architecture", ["topk", "mutual", "feature"])
def test_tokens_times_features_are_never_in_memory(architecture: str):
    make, tokens, features = MAKE[architecture].func, 16384, 65536
    options = MAKE[architecture].keywords
    with torch.device("cuda"):
        sae = make(D_MODEL, features, K, **options).cuda()
        x = torch.randn(tokens, D_MODEL)
    for _ in range(2):  # the second has a threshold to start from
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = sae.loss(x)
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before < tokens * features  # a quarter


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of a step not taken
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_scaled_losses_of_float16_train(make):
    torch.manual_seed(0)
    sae = make(optimizer=partial(torch.optim.Adam, lr=3e-3))
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        precision="16-mixed",
        max_epochs=10,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = DataLoader(superposition(8 * TOKENS, D_MODEL, 256, seed=0), batch_size=TOKENS)
    trainer.fit(sae, x, x)
    assert sae.W_dec.dtype == torch.float32
    assert int(sae.tokens_seen) == 10 * 8 * TOKENS
    assert trainer.callback_metrics["val/fvu"] < 1


# ModelCheckpoint, which is told in another folder what it saved in the one before.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("architecture", ["topk", "mutual", "feature", "per batch"])
def test_a_cut_does_not_show(architecture: str, precision: str, tmp_path: Path):
    make, options = MAKE[architecture].func, MAKE[architecture].keywords
    sources = tiny.arguments(tiny.save_model(tmp_path / "lm"), tiny.save_text(tmp_path / "t.jsonl"))

    def train(folder: Path, start: Path | None) -> dict[str, Any]:
        torch.manual_seed(0 if start is None else 1)  # what is drawn is no part of a checkpoint
        pl.Trainer(
            accelerator=ACCELERATOR,
            devices=1,
            precision=precision,
            max_steps=STEPS,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(
            make(tiny.D_MODEL, 32, 3, **options),
            ActivationDataModule(**sources),
            ckpt_path=start,
            weights_only=True,
        )
        raw = torch.load(folder / f"step={STEPS}.ckpt", weights_only=True, map_location="cpu")
        return {key: raw[key] for key in ("state_dict", "optimizer_states")}

    whole = train(tmp_path / "whole", None)
    resumed = train(tmp_path / "resumed", tmp_path / "whole" / f"step={STEPS // 2}.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0, equal_nan=True)
