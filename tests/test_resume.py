"""A run that is cut anywhere, any number of times, ends bit for bit as one that never was."""

import contextlib
import csv
import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_sae import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    MutualChoiceTranscoder,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.checkpoint_io import AtomicCheckpointIO
from lightning_sae.data import ActivationDataModule
from lightning_sae.parallel import Ranks
from tests.data.tiny import D_MODEL, arguments, save_model, save_text
from tests.helpers.ddp import run_on

# ModelCheckpoint, which is told in another folder what it saved in the one before.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

STEPS = 10  # three blocks of four batches without accumulation, the last one cut short
HELPING = {"dead_after_tokens": 320, "k_aux": 2, "dying_below": 0.5}
ARCHITECTURES: dict[str, Callable[[], SparseAutoencoder]] = {
    "standard": lambda: StandardSAE(D_MODEL, 32, 0.5, l1_warmup_tokens=5 * 64),
    "topk": lambda: TopKSAE(D_MODEL, 32, 3, multi_k_coefficient=0.1, dead_after_tokens=128),
    "jumprelu": lambda: JumpReLUSAE(D_MODEL, 32, 3, bandwidth=0.1),
    "gated": lambda: GatedSAE(D_MODEL, 32, 3),
    "mutual": lambda: MutualChoiceSAE(D_MODEL, 32, 3, **HELPING),
    "transcoder": lambda: MutualChoiceTranscoder(
        D_MODEL - 3, 32, k=3, d_target=3, skip=True, **HELPING
    ),
    "feature, uniform": lambda: FeatureChoiceSAE(
        D_MODEL, 32, 3, budgets="uniform", per_batch=True, mutual_choice_share=0, **HELPING
    ),
    # features choose from step 5 on
    "feature, both phases": lambda: FeatureChoiceSAE(
        D_MODEL, 32, 4, mutual_choice_share=0.5, **HELPING
    ),
    # budgets below one are rounded at random
    "feature, per batch": lambda: FeatureChoiceSAE(
        D_MODEL, 32, 4, mutual_choice_share=0.5, per_batch=True, min_matches=0.5, **HELPING
    ),
}


class Killed(BaseException):
    """As abrupt an end as there is within a process."""


class Watch(pl.Callback):
    """Notes the batches that this rank trains on, and ends the run where it is to be cut."""

    def __init__(self, cut: int | None) -> None:
        self.cut = cut
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.cut:
            raise Killed
        self.batches.append(batch)


class Runs:
    """Runs in one folder, of one and of two processes, and those that nothing cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.text = save_text(folder / "text.jsonl")
        self.numbers = itertools.count()
        self.whole = functools.cache(self.run)

    def run(self, ranks: int, *args: Any) -> tuple[Path, list[Tensor]]:
        """Return the folder of a run, and its batches over all ranks."""
        folder = self.folder / str(next(self.numbers))
        args = (self.folder, folder, *args)
        batches = run_on(ranks, train, *args) if ranks > 1 else [train(0, *args)]
        return folder, [torch.cat(shares) for shares in zip(*batches, strict=True)]


def train(
    rank: int,
    data: Path,
    folder: Path,
    case: str,
    accumulate: int,
    start: Path | None = None,
    cut: int | None = None,
) -> list[Tensor]:
    """Train from a checkpoint, or the beginning, to a cut, or the end; return the batches.

    The folder then has the curves, and a checkpoint of every step.
    """
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes of its own
    datasets.config.HF_DATASETS_CACHE = data / "cache"
    datasets.disable_progress_bars()
    torch.manual_seed(0 if start is None else 1)  # what is drawn is no part of a checkpoint
    watch = Watch(cut)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp" if Ranks().size > 1 else "auto",
        devices=Ranks().size,
        plugins=AtomicCheckpointIO(),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[
            watch,
            LearningRateMonitor(),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = ActivationDataModule(**arguments(data / "model", data / "text.jsonl"))
    with contextlib.suppress(Killed):
        trainer.fit(ARCHITECTURES[case](), stream, ckpt_path=start, weights_only=True)
    del os.environ["LOCAL_RANK"]
    return watch.batches


def state(folder: Path) -> dict[str, Any]:
    """Everything at the end of a run that a further step would depend on."""
    raw = torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)
    # Lightning takes a validation that was due at the cut for done, though it was not counted.
    del raw["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")
    return {key: raw[key] for key in keys} | {"cursor": raw["ActivationDataModule"]["cursor"]}


def curves(folder: Path) -> dict[tuple[str, int], list[float]]:
    """All that a run logged, by name and step."""
    found = defaultdict(list)
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found[name, int(row["step"])].append(float(value))  # all digits are there
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


PLANS = st.tuples(
    st.sampled_from(list(ARCHITECTURES)),
    st.integers(1, 4),  # batches of a step
    st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=4).map(sorted),  # steps to cut after
    st.one_of(  # processes before, between and after the cuts: always as many, or not
        st.integers(1, 2).map(lambda ranks: [ranks] * 5),
        st.lists(st.integers(1, 2), min_size=5, max_size=5),
    ),
)


def cut_and_resume(runs: Runs, case: str, accumulate: int, cuts: list[int], ranks: list[int]):
    folder, batches = runs.whole(ranks[0], case, accumulate)
    read, logged = batches[: cuts[0] * accumulate], [curves(folder)]
    for number, cut, until in zip(ranks[1:], cuts, [*cuts[1:], None], strict=False):
        folder, batches = runs.run(number, case, accumulate, folder / f"step={cut}.ckpt", until)
        read += batches
        logged.append(curves(folder))
    alike = len(set(ranks[: len(cuts) + 1])) == 1
    expected, expected_batches = runs.whole(ranks[0] if alike else 1, case, accumulate)
    torch.testing.assert_close(read, expected_batches, rtol=0, atol=0)
    # Another number of processes adds up in another order.
    tolerance = dict.fromkeys(("rtol", "atol"), 0 if alike else 1e-5) | {"equal_nan": True}
    torch.testing.assert_close(state(folder), state(expected), **tolerance)
    for (name, step), values in curves(expected).items():
        if alike or not name.startswith("train/"):  # which are those of one rank's tokens
            found = logged[sum(cut <= step for cut in cuts)][name, step]
            torch.testing.assert_close(found, values, **tolerance, msg=f"{name}, step {step}")


@given(plan=PLANS)
@settings(deadline=None, derandomize=True, max_examples=4, phases=[Phase.generate])
def test_a_cut_does_not_show(runs: Runs, plan):
    cut_and_resume(runs, *plan)


@pytest.mark.slow
def test_no_cut_of_hundreds_shows(runs: Runs):
    cuts_made = 0

    @given(plan=PLANS)
    @settings(deadline=None, derandomize=True, max_examples=150, phases=[Phase.generate])
    def test(plan):
        nonlocal cuts_made
        cut_and_resume(runs, *plan)
        cuts_made += len(plan[2])

    test()
    assert cuts_made >= 200
