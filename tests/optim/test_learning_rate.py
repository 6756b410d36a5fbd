"""The rate that Lightning's finders find, from the first step to the last."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR
from torch.utils.data import DataLoader

from lightning_sae import MutualChoiceSAE
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations, every_architecture

STEPS = 4
SHARES = [1.0, *((1 - step / STEPS) / 0.95 for step in range(1, STEPS))]
"""Of the highest rate, by step: a warm-up of a twentieth is over at once."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no",
    # of Lightning's search, whose schedule steps by itself
    "ignore:Detected call of `lr_scheduler.step",
    "ignore:You're resuming from a checkpoint that ended before",
)


class Rates(pl.Callback):
    """The rates of all steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(folder, *callbacks) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader() -> DataLoader:
    return DataLoader(activations(4096), batch_size=128)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_architecture
def test_a_tuner_finds_a_rate_and_the_run_after_it_begins_with_it(make, tmp_path):
    sae, rates = make(), Rates()
    run = trainer(tmp_path, rates)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    found = Tuner(run).lr_find(sae, loader(), num_training=20).suggestion()
    assert found == sae.lr
    after = sae.state_dict()
    assert all(value.equal(after[name]) or value.isnan().all() for name, value in before.items())
    rates.seen.clear()
    run.fit(sae, loader())
    assert rates.seen == pytest.approx([found * share for share in SHARES])


def test_the_callback_finds_the_same_and_schedules_keep_to_it(tmp_path):
    def halved(optimizer):
        parts = [ConstantLR(optimizer, factor=1), ExponentialLR(optimizer, 0.5)]
        return SequentialLR(optimizer, parts, milestones=[2])

    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, lr_scheduler=halved)
    rates = Rates()
    run = trainer(tmp_path, LearningRateFinder(num_training_steps=20), rates)
    run.fit(sae, loader())
    assert sae.lr is not None
    assert rates.seen == pytest.approx([sae.lr, sae.lr, sae.lr, sae.lr / 2])


def test_a_search_changes_nothing_but_the_rate(tmp_path):
    def trained(*callbacks) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
        trainer(tmp_path, *callbacks).fit(sae, loader())
        return sae.state_dict()

    expected = trained()
    search = LearningRateFinder(num_training_steps=20, update_attr=False)
    found = trained(search)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_rate_that_is_set_by_hand_is_the_first(tmp_path):
    sae, rates = MutualChoiceSAE(D_MODEL, N_FEATURES, K), Rates()
    assert sae.lr is None
    sae.lr = 0.25
    trainer(tmp_path, rates).fit(sae, loader())
    assert rates.seen == pytest.approx([0.25 * share for share in SHARES])


def test_one_that_is_set_in_a_run_is_that_of_the_rest(tmp_path):
    class Change(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.lr = 0.5

    sae, rates = MutualChoiceSAE(D_MODEL, N_FEATURES, K), Rates()
    sae.lr = 0.25
    trainer(tmp_path, Change(), rates).fit(sae, loader())
    assert rates.seen[:2] == pytest.approx([0.25 * share for share in SHARES[:2]])
    assert rates.seen[3] == pytest.approx(0.5 * SHARES[3])
