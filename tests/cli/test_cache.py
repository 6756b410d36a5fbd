"""`lightning_sae cache` as a user meets it."""

import fcntl
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lightning_sae import StoredActivationsDataModule
from lightning_sae.cli import main
from lightning_sae.data import LanguageModel
from tests.data.tiny import LENGTH, arguments, save_model, save_text


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    settings = arguments(save_model(tmp_path / "model"), save_text(tmp_path / "text.jsonl"))
    options = [f"--data.{name}={value}" for name, value in settings.items()]
    few = ["--trainer.max_steps=7", "--model.n_features=16", "--trainer.limit_val_batches=0"]
    return ["--config=topk.yaml", *options, *few, "--model.k=2", "--data.cache_dir=kept"]


def test_it_keeps_what_a_run_reads(line, tmp_path, capsys, monkeypatch):
    main(["cache", *line])
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "kept").iterdir()
    assert "contexts take" in printed
    assert f"--data.activations kept/{folder.name}" in printed
    assert not (tmp_path / "runs").exists()
    kept = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    main(["cache", *line])
    main(["fit", *line, "--trainer.callbacks=null"])
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == kept
    data = StoredActivationsDataModule(str(folder), held_out_share=0.1)
    assert data.positions_per_input == LENGTH
    assert data.description["model_name"] == str(tmp_path / "model")


def test_what_is_interrupted_goes_on(line, tmp_path, monkeypatch):
    read, calls = LanguageModel.read, []

    def stop_at_four(self, *args, **options):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "read", stop_at_four)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["cache", *line])
        (folder,) = (tmp_path / "kept").iterdir()
        assert sum(len(load_file(file)["key"]) for file in folder.iterdir()) == 15
        main(["cache", *line])
    kept = [key for file in folder.iterdir() for key in load_file(file)["key"].tolist()]
    assert len(kept) == len(set(kept))


def refused(args: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["cache", *args])
    printed = capsys.readouterr().err
    return printed if isinstance(exit_.value.code, int) else str(exit_.value.code)


def test_mistakes_are_told_in_a_line(line, tmp_path, capsys):
    assert "cache_limit_gb=1e-05: raise" in refused([*line, "--data.cache_limit_gb=1e-5"], capsys)
    assert "data.cache_dir=None: name a" in refused([*line, "--data.cache_dir=null"], capsys)
    assert "trainer.devices=2: a cache" in refused(
        [*line, "--trainer.devices=2", "--trainer.accelerator=cpu"], capsys
    )
    np.save("a.npy", np.zeros((9, 8), "float32"))
    stored = ["--config=topk.yaml", "--config=data/stored.yaml", "--data.activations=a.npy"]
    assert "no model computes these, they lie in files" in refused(stored, capsys)
    assert not list((tmp_path / "kept").glob("*/*"))


def test_two_do_not_fill_one_folder(line, tmp_path, capsys):
    main(["cache", *line])
    (folder,) = (tmp_path / "kept").iterdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "data.cache_dir=" in (told := refused(line, capsys))
    assert "another run is writing to this folder" in told
    os.close(held)


def test_the_help_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: lightning_sae cache")
    assert (
        "Keep what `fit` and `test` would read in --data.cache_dir, and train nothing." in printed
    )
    assert "--trainer.max_steps" in printed
    assert "Raises" not in printed
