"""The curves on disk when a checkpoint gets its name."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_sae import TopKSAE
from lightning_sae.checkpoint_io import AtomicCheckpointIO

WIDTH = 8
NAMES = {"train/loss", "train/tokens", "train/mine_step"}


class Logs(TopKSAE):
    """Also logs something of its own, by step and by epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("train/mine", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
        return super().training_step(batch, batch_idx)


class Looks(AtomicCheckpointIO):
    """Notes what is on disk when each checkpoint has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[int, dict[str, list[int]]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
        super().save_checkpoint(checkpoint, *args, **options)
        self.seen[checkpoint["global_step"]] = curves(self.folder)


def curves(folder: Path) -> dict[str, list[int]]:
    """Return the steps that are on disk, by name."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.csv"):
        for row in csv.DictReader(file.read_text().splitlines()):
            for name in (name for name in row if row[name]):
                found.setdefault(name, []).append(int(row["step"]))
    for file in folder.glob("events*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found[name] = [event.step for event in events.Scalars(name)]
    return found


def fit(folder: Path, logger: Any, **options: Any) -> Looks:
    looks = Looks(folder)
    torch.manual_seed(0)
    saves = [ModelCheckpoint(folder, every_n_train_steps=n, save_last=n == 4) for n in (4, 5)]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger(folder, name="", version=""),
        callbacks=saves,
        plugins=looks,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Logs(WIDTH, 16, 2), DataLoader(torch.randn(11 * 32, WIDTH), batch_size=32))
    assert trainer.callback_metrics["train/loss"] > 0
    assert trainer.callback_metrics["train/mine_epoch"] == 5  # the mean of 0 to 10
    return looks


@pytest.mark.filterwarnings(
    "ignore:(Checkpoint directory|Experiment logs directory|You defined a .validation_step)"
)
@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"log_every_n_steps": 1}, range(11)),
        ({"log_every_n_steps": 3}, [2, 5, 8]),
        ({"log_every_n_steps": 1, "accumulate_grad_batches": 2}, range(6)),
    ],
    ids=["each", "each third", "accumulated"],
)
def test_curves_reach_as_far_as_checkpoints(logger, options, steps, tmp_path: Path):
    looks = fit(tmp_path, logger, **options)
    assert set(looks.seen) >= {4}
    for step, there in looks.seen.items():
        for name in NAMES:
            assert there[name] == [each for each in steps if each < step]
    for name in NAMES:  # each once, whether a checkpoint was saved there or not
        assert curves(tmp_path)[name] == list(steps)
