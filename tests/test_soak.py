"""A run that goes on and on: memory and open files stay where they are, and counts are exact."""

import gc
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.metric_sync import resident
from lightning_sae import ActivationDataModule, MutualChoiceSAE, TopKSAE
from lightning_sae.callbacks import (
    AdaptiveComputationCallback,
    FeatureDensityFigures,
    LossRecoveredCallback,
)
from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureDensity
from lightning_sae.parallel import Ranks
from lightning_sae.quickstart import TEXT
from tests.helpers.superposition import superposition

D_MODEL, TOKENS, BATCHES = 8, 32, 16


class Activations(Dataset):
    """Batches from memory, the same few again and again."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        tokens = superposition(BATCHES * TOKENS, D_MODEL, n_features=16, seed=0)
        self.batches = tokens.split(TOKENS)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        return self.batches[step % BATCHES]


class Resources(pl.Callback):
    """Notes the memory, in bytes, and the number of open files, every thousand steps."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 1000 == 0:
            self.memory.append(resident())
            self.files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - a number is all


@pytest.mark.slow
def test_a_hundred_thousand_steps(tmp_path: Path):
    """With validations, checkpoints and curves, which are what could pile up."""
    steps = 100_000
    sae = MutualChoiceSAE(D_MODEL, 32, 3, dead_after_tokens=50 * TOKENS, dying_below=0.5)
    resources = Resources()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=500,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=500),
        callbacks=[resources, ModelCheckpoint(tmp_path / "kept", every_n_train_steps=500)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        sae,
        DataLoader(Activations(steps), batch_size=None),
        DataLoader(Activations(2), batch_size=None),
    )
    assert sae.tokens_seen == steps * TOKENS
    assert len(resources.memory) == steps // 1000
    warm = resources.memory[4]
    assert max(resources.memory[5:]) < 1.02 * warm, resources.memory
    assert len(set(resources.files[5:])) == 1, resources.files


class Kept(pl.Callback):
    """Notes what is there after every validation: memory, in bytes, tensors and figures."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.tensors: list[tuple[int, int]] = []  # their number, and their bytes
        self.figures: list[int] = []

    def on_validation_end(self, *_):
        kinds = [(type(each), each) for each in gc.get_objects()]
        self.figures.append(sum(kind is Figure for kind, _ in kinds))
        del kinds
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
        self.tensors.append((len(tensors), sum(each.nbytes for each in tensors)))
        self.memory.append(resident())


@pytest.mark.slow
def test_fifty_validations_keep_nothing(tmp_path: Path):
    """Of a language model's held-out text, with all callbacks of the shipped configurations."""
    data = ActivationDataModule(
        model_name="quickstart",
        layer=2,
        text=str(TEXT / "validation.parquet"),
        held_out_documents=40,
        batch_size=256,
        batches_per_block=4,
        validation_tokens=512,
        test_tokens=128,
    )
    kept = Kept()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=100,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[
            FeatureDensityFigures(),
            LossRecoveredCallback(512),
            AdaptiveComputationCallback(512),
            ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2),
            kept,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MutualChoiceSAE(256, 128, 4), data)
    assert len(kept.memory) == 50
    assert set(kept.figures) == {0}, kept.figures
    numbers, sizes = zip(*kept.tensors[1:], strict=True)
    assert len(set(numbers)) == 1, numbers
    assert max(sizes) - min(sizes) < 1000, sizes
    early, late = kept.memory[10:20], kept.memory[-10:]
    assert sorted(late)[5] < 1.05 * sorted(early)[5], kept.memory


PRECISIONS = ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"]


@pytest.mark.parametrize("updates", [1000, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_counts_are_exact(precision: str, updates: int):
    """One token a time: the first feature always fires, the second once, the third never."""
    plugin = pl.Trainer(accelerator="cpu", precision=precision, logger=False).precision_plugin
    history = plugin.convert_module(TopKSAE(D_MODEL, 3, 1)).history
    density = plugin.convert_module(FeatureDensity(3))
    scores = plugin.convert_input(torch.ones(1, 3))
    first, second = (
        Matches(torch.tensor([0]), torch.tensor([feature]), scores[0, :1], (1, 3))
        for feature in (0, 1)
    )
    for matches in (second, *[first] * (updates - 1)):
        with plugin.forward_context():
            history.update(matches.per_feature(), 1, Ranks())
            density.update(matches)
    assert history.tokens_seen == density.tokens == updates
    assert history.tokens_since_fired.tolist() == [0, updates - 1, updates]
    assert density.fires.tolist() == [updates - 1, 1, 0]
