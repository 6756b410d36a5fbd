"""Whatever ends a run, its last checkpoint is the good one before."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_sae import SparseAutoencoder
from lightning_sae.checkpoint_io import AtomicCheckpointIO
from lightning_sae.cli import main
from tests.faults.runs import arguments, checkpoints, state

EVERY_TWO_STEPS = json.dumps(
    [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_last": True}}]
)


def run(text: Path, **changes: Any) -> list[str]:
    return arguments(data__text=text, trainer__callbacks=EVERY_TWO_STEPS, **changes)


def in_call(patch: pytest.MonkeyPatch, method: str, call: int, break_: Any) -> None:
    """Break something just before, or within, the given call of a method of the SAE."""
    calls = 0
    original = getattr(SparseAutoencoder, method)

    def broken(sae: SparseAutoencoder, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            args = break_(sae, *args)
        return original(sae, *args, **kwargs)

    patch.setattr(SparseAutoencoder, method, broken)


def activations(value: float) -> Any:
    def break_(sae: SparseAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = x.clone()
        x[3, 5] = value
        return (x,)

    return break_


def weights(value: float) -> Any:
    def break_(sae: SparseAutoencoder, *args: Any) -> tuple[Any, ...]:
        sae.encoder.bias.data[0] = value
        return args

    return break_


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("method", "call", "break_", "expected"),
    [
        ("loss", 4, activations, "affinities are not finite after 768 tokens"),
        ("loss", 4, weights, "affinities are not finite after 768 tokens"),
        ("normalize_decoder", 3, weights, "affinities are not finite after 768 tokens"),
        ("normalize_decoder", 4, weights, "encoder.bias has NaN or Inf after 4 steps"),  # a save
    ],
)
def test_nan_stops_within_a_step(
    method, call, break_, expected, value, text, told, tmp_path, monkeypatch
):
    in_call(monkeypatch, method, call, break_(value))
    assert expected in told(run(text))
    assert len(checkpoints(tmp_path)) == 2  # one on schedule and the last one
    assert all(state(path)["global_step"] == 2 for path in checkpoints(tmp_path))


def test_a_learning_rate_that_is_too_high(text, told, tmp_path):
    assert "lower the learning rate" in told(run(text, model__optimizer__lr=1e30))
    for path in checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in state(path)["state_dict"].values())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more(code: int, text, told, tmp_path, monkeypatch):
    saves, fsync = 0, os.fsync

    def fail(descriptor: int) -> None:
        nonlocal saves
        if "step=4.ckpt." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            saves += 1
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    line = told(run(text))
    assert f"the checkpoint cannot be written: {os.strerror(code)}: '" in line
    assert line.endswith("checkpoints/epoch=0-step=4.ckpt'")
    assert saves == 1
    assert all(state(path)["global_step"] == 2 for path in checkpoints(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("named", [AtomicCheckpointIO, TorchCheckpointIO])
def test_checkpoints_are_atomic_unless_the_user_names_another_way(named, text, monkeypatch):
    used = []
    monkeypatch.setattr(
        pl.Trainer, "fit", lambda trainer, *_, **__: used.append(trainer.strategy.checkpoint_io)
    )
    plugins = {"trainer__plugins": "TorchCheckpointIO"} if named is TorchCheckpointIO else {}
    main(run(text, **plugins))
    assert type(used[0]) is named


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("asked", "name"), [("hpc", "hpc_ckpt_3.ckpt"), ("last", "kept/last.ckpt")]
)
def test_a_damaged_checkpoint_that_lightning_finds(asked, name, text, told, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"PK")
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}]
    line = told(
        arguments(data__text=text, trainer__callbacks=json.dumps(callbacks), ckpt_path=asked)
    )
    assert f"{name} is no checkpoint, or is damaged" in line
    assert checkpoints(tmp_path) == [path]
