"""More matches a token at the start."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sae import (
    FeatureChoiceSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.callbacks import KDecay
from lightning_sae.checks import UsageError
from tests.helpers.superposition import superposition

K, BATCH = 2, 50


class Matches(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.callback_metrics["train/l0"].item())


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, steps: int, path: Path | None = None
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    tokens = DataLoader(superposition(1000, 8, 16, 0), BATCH)
    held_out = tokens if isinstance(module, SparseAutoencoder) else None
    trainer.fit(module, tokens, held_out, ckpt_path=path)
    return trainer


@pytest.mark.parametrize("kind", [TopKSAE, MutualChoiceSAE, FeatureChoiceSAE])
def test_matches_go_down_in_a_straight_line(kind):
    torch.manual_seed(0)
    matches, sae = Matches(), kind(8, 24, K)
    fit(sae, KDecay(6, tokens=4 * BATCH), matches, steps=6)
    assert matches.seen[:6] == pytest.approx([6, 5, 4, 3, 2, 2], abs=0.3)  # few are positive
    assert sae.k == K


# Which tokens come is of no matter here.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_goes_on_with_the_same(tmp_path):
    def made() -> TopKSAE:
        torch.manual_seed(0)
        return TopKSAE(8, 24, K)

    whole, first, second = Matches(), Matches(), Matches()
    fit(made(), KDecay(10, tokens=8 * BATCH), whole, steps=10)
    fit(made(), KDecay(10, tokens=8 * BATCH), first, steps=3).save_checkpoint(tmp_path / "a.ckpt")
    fit(made(), KDecay(10, tokens=8 * BATCH), second, steps=10, path=tmp_path / "a.ckpt")
    assert second.seen == pytest.approx(whole.seen[3:], abs=0.3)
    assert second.seen[0] > 6


def test_a_run_that_ends_early_leaves_the_sae_with_its_own_k():
    sae = TopKSAE(8, 24, K)
    fit(sae, KDecay(6, tokens=1000), steps=2)
    assert sae.k == K


def test_the_sae_may_be_a_part_of_the_module():
    class Parent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sae = TopKSAE(8, 24, K)
            self.seen: list[int] = []

        def training_step(self, batch, _):
            self.seen.append(self.sae.k)
            return self.sae.loss(batch)[0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    parent = Parent()
    fit(parent, KDecay(4, tokens=2 * BATCH), steps=3)
    assert parent.seen == [4, 3, 2]


@pytest.mark.parametrize("sae", [StandardSAE(8, 24), JumpReLUSAE(8, 24, K)])
def test_an_sae_whose_penalty_finds_its_matches_is_refused(sae):
    with pytest.raises(UsageError, match=rf"^KDecay cannot be used with {type(sae).__name__}, "):
        fit(sae, KDecay(4, tokens=100), steps=1)


@pytest.mark.parametrize("start", [K - 1, 25])
def test_a_start_out_of_range_is_refused(start):
    with pytest.raises(UsageError, match=rf"^start={start} of KDecay is out of range"):
        fit(TopKSAE(8, 24, K), KDecay(start, tokens=100), steps=1)


@pytest.mark.parametrize("arguments", [{"start": 0, "tokens": 1}, {"start": 4, "tokens": 0}])
def test_arguments_that_are_not_positive_are_refused(arguments):
    with pytest.raises(UsageError, match="=0 must be at least 1"):
        KDecay(**arguments)
