"""What a progress bar counts and shows, by rich and as plain text."""

import re

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_sae import SeveralSAEs, TopKSAE
from lightning_sae.callbacks import RichStepsBar, TokensPerSecond, TQDMStepsBar
from tests.callbacks.fakes import D_MODEL, N_FEATURES, FakeSAE, tensors, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint that ended before",
)


def shown(bar: TQDMStepsBar | RichStepsBar) -> tuple[str, float, float]:
    """What a finished bar says: what it counts, how many, and of how many."""
    task = bar.train_progress_bar
    if isinstance(bar, TQDMStepsBar):
        return task.desc.rstrip(": "), task.n, task.total
    return task.description.strip(), task.completed, task.total


@pytest.mark.parametrize("bar", [RichStepsBar, TQDMStepsBar])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_counts_the_steps_of_the_run(bar, accumulate, tmp_path, capsys):
    options = {"max_epochs": -1, "enable_progress_bar": True, "enable_checkpointing": True}
    options |= {"accumulate_grad_batches": accumulate, "logger": CSVLogger(tmp_path / "logs")}
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, filename="{step}")
    run = trainer(tmp_path, bar(), TokensPerSecond(), save, max_steps=3, **options)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, 2), tensors(4))
    assert shown(run.progress_bar_callback) == ("Step", 3, 3)
    options["enable_checkpointing"] = False
    run = trainer(tmp_path, bar(), TokensPerSecond(), max_steps=5, **options)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, 2), tensors(4), ckpt_path=tmp_path / "saved/step=3.ckpt")
    assert shown(run.progress_bar_callback) == ("Step", 5, 5)  # Lightning's: of 2
    metrics = run.progress_bar_callback.get_metrics(run, run.lightning_module)
    assert list(metrics) == ["loss", "L0", "dead", "tokens/s"]
    assert metrics["L0"] == "2"
    assert re.fullmatch(r"[\d,.e+]+", metrics["tokens/s"])
    capsys.readouterr()


def test_of_several_it_shows_the_mean(tmp_path, capsys):
    run = trainer(tmp_path, TQDMStepsBar(), max_steps=3, max_epochs=-1, enable_progress_bar=True)
    each = D_MODEL // 2
    made = iter([1, 2])
    module = SeveralSAEs(lambda d: TopKSAE(d, N_FEATURES, next(made)), {"a": each, "b": each})
    run.fit(module, tensors(4))
    metrics = run.progress_bar_callback.get_metrics(run, module)
    assert list(metrics) == ["loss", "L0", "dead"]
    assert metrics["L0"] == "1.5"
    capsys.readouterr()


def test_of_epochs_it_counts_the_steps_of_all(tmp_path, capsys):
    run = trainer(tmp_path, TQDMStepsBar(), max_epochs=3, enable_progress_bar=True)
    module = FakeSAE()  # which has none of what is shown
    run.fit(module, tensors(4))
    assert shown(run.progress_bar_callback) == ("Step", 12, 12)
    assert run.progress_bar_callback.get_metrics(run, module) == {}
    capsys.readouterr()
