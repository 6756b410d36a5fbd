"""Which batches checkpoints are written after, where a step takes three."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_sae import MutualChoiceSAE
from tests.helpers.superposition import superposition

# There is no data module whose place a checkpoint could keep.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

STEPS, ACCUMULATE, BATCHES = 6, 3, 64


class Saves(Callback):
    """Notes after how many batches and steps the Trainer writes a checkpoint."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.seen.append((trainer.fit_loop.batch_idx + 1, trainer.global_step))


def saves(folder: Path, start: Path | None = None, **options: Any) -> list[tuple[int, int]]:
    noted = Saves()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[noted, ModelCheckpoint(folder, "{step}", save_top_k=-1, **options)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = superposition(BATCHES * 16, 8, n_features=16, seed=0)
    loaders = DataLoader(x, batch_size=16), DataLoader(x[:32], batch_size=16)
    trainer.fit(MutualChoiceSAE(8, 24, 3), *loaders, ckpt_path=start, weights_only=True)
    return noted.seen


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_train_steps": 2}, [2, 4, 6]),
        ({"train_time_interval": timedelta(0)}, [1, 2, 3, 4, 5, 6]),
        # validations after batches 2, 4, 6 ... 18
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, [2, 4, 6]),
        ({"monitor": "val/fvu", "every_n_train_steps": 1}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=["by steps", "by the clock", "by validations", "by a figure"],
)
def test_checkpoints_are_written_after_whole_steps(options, steps, tmp_path: Path):
    assert saves(tmp_path, **options) == [(ACCUMULATE * step, step) for step in steps]


def test_a_resumed_run_does_not_save_its_first_batch_as_the_step_before(tmp_path: Path):
    saves(tmp_path, every_n_train_steps=2)
    resumed = saves(tmp_path / "resumed", tmp_path / "step=4.ckpt", every_n_train_steps=2)
    assert resumed == [(ACCUMULATE * 6, 6)]
