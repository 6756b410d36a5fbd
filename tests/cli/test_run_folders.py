"""Two runs in one folder, and what a run that fails leaves behind."""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.multiprocessing import ProcessRaisedException

from lightning_sae import ActivationDataModule, SparseAutoencoder
from lightning_sae.checks import UsageError
from lightning_sae.cli import main
from lightning_sae.cli.run_folders import own_folders
from tests.callbacks.fakes import FakeSAE, tensors, trainer
from tests.faults.runs import CALLBACKS, arguments, checkpoints, write_text
from tests.helpers.ddp import run_on_two

SAVE = json.dumps([{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}])
ROOT = {
    "trainer__callbacks": json.dumps([{"class_path": "ModelCheckpoint"}]),
    "trainer__logger": "false",
    "trainer__default_root_dir": "out",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def first(patch: pytest.MonkeyPatch, owner: type, method: str, do: Callable[..., None]) -> None:
    """Do something before the first call of a method goes on."""
    original, calls = getattr(owner, method), iter([do])

    def replaced(*args: Any, **kwargs: Any) -> Any:
        next(calls, lambda *_, **__: None)(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, method, replaced)


def fail(*args: Any, **kwargs: Any) -> None:
    raise UsageError("as asked")


def test_a_run_that_starts_during_another_has_a_folder_of_its_own(text, tmp_path, monkeypatch):
    def beside(*_: Any) -> None:
        main(arguments(data__text=text, seed_everything=2))

    first(monkeypatch, ActivationDataModule, "prepare_data", beside)  # when logs are not yet there
    main(arguments(data__text=text, seed_everything=1))
    versions = [tmp_path / f"runs/topk/version_{number}" for number in (0, 1)]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in versions]
    assert [config["seed_everything"] for config in configs] == [1, 2]
    weights = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in versions
    ]
    assert not torch.equal(*(each["encoder.weight"] for each in weights))
    assert all(len(list(folder.glob("events*"))) == 1 for folder in versions)
    assert len(checkpoints(tmp_path)) == 2


def test_a_run_that_fails_leaves_the_one_beside_it_alone(text, tmp_path, monkeypatch):
    def beside(*_: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(SparseAutoencoder, "training_step", fail)
            with pytest.raises(SystemExit, match="as asked"):
                main(arguments(data__text=text))
        assert [path.name for path in (tmp_path / "runs/topk").iterdir()] == ["version_0"]

    first(monkeypatch, SparseAutoencoder, "configure_optimizers", beside)
    main(arguments(data__text=text))
    names = {path.name for path in (tmp_path / "runs/topk/version_0").iterdir()}
    assert {"checkpoints", "config.yaml"} < names


def test_a_run_that_fails_removes_nothing_of_anyone_else(text, tmp_path, monkeypatch):
    def put(*_: Any) -> None:
        (tmp_path / "out/mine.txt").write_text("")
        fail()

    first(monkeypatch, SparseAutoencoder, "training_step", put)
    with pytest.raises(SystemExit, match="as asked"):
        main(arguments(data__text=text, data__cache_dir="out/cache", **ROOT))
    assert (tmp_path / "out/mine.txt").exists()
    gc.collect()  # as at the end of the process, what was to be kept is written
    assert list((tmp_path / "out/cache").rglob("*.safetensors"))


def test_a_resumed_run_that_fails_in_its_first_step_leaves_nothing(text, tmp_path, monkeypatch):
    main(arguments(data__text=text, trainer__max_steps=3))
    before = sorted(tmp_path.rglob("*"))
    checkpoint = tmp_path / "runs/topk/version_0/checkpoints/last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoder, "training_step", fail)
        with pytest.raises(SystemExit, match="as asked"):
            main(arguments(data__text=text, ckpt_path=checkpoint))
    assert sorted(tmp_path.rglob("*")) == before

    def fail_later(sae: SparseAutoencoder, *_: Any) -> None:
        if sae.trainer.global_step == 4:
            fail()

    monkeypatch.setattr(SparseAutoencoder, "on_train_batch_start", fail_later)
    with pytest.raises(SystemExit, match="as asked"):
        main(arguments(data__text=text, ckpt_path=checkpoint))
    assert (tmp_path / "runs/topk/version_1/config.yaml").exists()  # with the curves of a step


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (ROOT, "trainer.default_root_dir={folder}/out: another run is writing to this folder"),
        (
            {"trainer__logger__init_args__version": "mine"},
            "trainer.logger.init_args.version={folder}/runs/topk/mine: another run is writing",
        ),
        ({"trainer__callbacks": SAVE}, "dirpath={folder}/kept: another run is writing"),
    ],
    ids=["root", "version", "dirpath"],
)
def test_two_runs_in_a_folder_that_is_named(settings, told, text, tmp_path, monkeypatch):
    line = arguments(**{"data__text": text, **settings})

    def beside(*_: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            main(line)
        assert told.format(folder=tmp_path) in str(exit_.value.code)
        assert sorted(tmp_path.rglob("*")) == before

    first(monkeypatch, SparseAutoencoder, "training_step", beside)
    main(line)
    assert checkpoints(tmp_path)


def loggers(folder: Path) -> dict[str, list[Any]]:
    return {
        "TensorBoard": [TensorBoardLogger(folder)],
        "CSV without a name": [CSVLogger(folder, name=None)],
        "sub-folder": [TensorBoardLogger(folder, name="a", sub_dir="b")],
        "variable": [TensorBoardLogger("$FOLDER", name="a")],
        "several": [TensorBoardLogger(folder, name="a"), CSVLogger(folder, name="a")],
        "named by the user": [CSVLogger(folder, name="a", version="b")],
        "a file of that name": [CSVLogger(folder, name="file")],
    }


@pytest.mark.parametrize("kind", loggers(Path()))
def test_loggers_get_folders_of_their_own(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    (tmp_path / "file").mkdir()
    (tmp_path / "file/version_0").touch()
    taken = []
    named = kind == "named by the user"
    for _ in range(2):
        run = trainer(tmp_path, logger=loggers(tmp_path)[kind])
        with own_folders(run, "fit"):
            taken += [logger.log_dir for logger in run.loggers]
            assert all(Path(each).is_dir() for each in taken)
    assert len(set(taken)) == (1 if named else len(taken))
    present = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), own_folders(run, "fit"):
        1 / 0  # noqa: B018
    assert sorted(tmp_path.rglob("*")) == present  # for these were there before


def test_folders_without_a_run_are_gone_with_their_parents(tmp_path):
    save = ModelCheckpoint(tmp_path / "x/y")
    logger = TensorBoardLogger(tmp_path / "p", name="a", sub_dir="b")
    run = trainer(tmp_path, save, enable_checkpointing=True, logger=logger)

    def log_and_fail() -> None:
        assert (tmp_path / "x/y").is_dir()
        assert logger.experiment
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), own_folders(run, "fit"):
        log_and_fail()
    assert not list(tmp_path.iterdir())


class FailAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            fail()


@pytest.mark.parametrize("step", [0, 2])
def test_logs_of_steps_that_were_taken_in_another_process_stay(step, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    run = trainer(tmp_path, FailAt(step), logger=logger, strategy="ddp_spawn", devices=1)
    with pytest.raises(ProcessRaisedException, match="as asked"), own_folders(run, "fit"):
        run.fit(FakeSAE(), tensors())
    found = [path.name for path in tmp_path.rglob("version_*")]
    assert found == (["version_0"] if step else [])


def test_two_predictions_do_not_mix(text, tmp_path, monkeypatch):
    main(arguments(data__text=text))
    checkpoint = tmp_path / "runs/topk/version_0/checkpoints/last.ckpt"
    write = {"class_path": "lightning_sae.callbacks.WriteMatches"}
    write["init_args"] = {"output_dir": "matches"}
    callbacks = json.dumps([*CALLBACKS, write])
    line = arguments("predict", ckpt_path=checkpoint, trainer__callbacks=callbacks, data__text=text)

    def beside(*_: Any) -> None:
        with pytest.raises(SystemExit, match=r"output_dir=.*matches: another run is writing"):
            main(line)

    first(monkeypatch, SparseAutoencoder, "predict_step", beside)
    main(line)
    assert len(list((tmp_path / "matches").iterdir())) == 4  # 1024 tokens
    with pytest.raises(SystemExit, match="holds matches already"):
        main(line)


def fit(rank: int, folder: Path) -> tuple[str, str]:
    """Return the folders that a rank takes for those of its run."""
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes of its own
    save = ModelCheckpoint(every_n_train_steps=1)
    options = {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
    run = trainer(folder, save, logger=CSVLogger(folder), **options)
    with own_folders(run, "fit"):
        run.fit(FakeSAE(), tensors(2))
    del os.environ["LOCAL_RANK"]
    return run.loggers[0].log_dir, save.dirpath


def test_all_ranks_of_a_run_have_the_same_folder(tmp_path):
    for number in range(2):
        version = tmp_path / f"lightning_logs/version_{number}"
        assert run_on_two(fit, tmp_path) == [(str(version), str(version / "checkpoints"))] * 2
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 2
