"""Runs with features shared out, by a Trainer and the command, from one checkpoint to the next."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import ChunkedAdam, FeatureChoiceSAE, TopKSAE
from lightning_sae.callbacks import FiniteWeights, WriteMatches
from lightning_sae.checkpoint_format import FORMAT, KEY
from lightning_sae.checkpoint_io import AtomicCheckpointIO
from lightning_sae.cli import main
from lightning_sae.parallel.ranks import processes
from tests.helpers.ddp import run_on
from tests.helpers.superposition import superposition

TOKENS, FEATURES = 128, 49  # features that two processes cannot share equally


def trainer_on(groups: int, **settings: Any) -> pl.Trainer:
    """Return a Trainer of this process alone, or of all that are in its group already."""
    count = processes()[1]
    together: dict[str, Any] = {
        "strategy": ModelParallelStrategy(
            groups, count // groups, save_distributed_checkpoint=False
        ),
        "plugins": [AtomicCheckpointIO(), TorchElasticEnvironment()],
        "devices": count,
    }
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        gradient_clip_val=0.05,
        use_distributed_sampler=False,  # Lightning's would shuffle
        **(together if count > 1 else {}),
        **settings,
    )


def fit(
    process: int,
    folder: Path,
    name: str,
    *,
    steps: int = 8,
    start: str | None = None,
    groups: int = 1,
    chunked: bool = False,
) -> dict[str, float]:
    """Train from a checkpoint to so many steps, save, predict, and return what a test measures."""
    count = processes()[1]
    place = process * groups // count  # of this process's group
    x = superposition(4 * TOKENS, 8, n_features=16, seed=0).double().view(4, TOKENS, 8)
    own = TensorDataset(x.chunk(groups, 1)[place].flatten(0, 1))
    loader = DataLoader(own, batch_size=TOKENS // groups)
    adam = partial(torch.optim.Adam, weight_decay=0.0, fused=True)  # as ChunkedAdam says it
    torch.manual_seed(process)  # each takes rows of its own dictionary
    sae = FeatureChoiceSAE(
        8,
        FEATURES,
        3,
        mutual_choice_tokens=5 * TOKENS,
        dead_after_tokens=2 * TOKENS,
        optimizer=ChunkedAdam if chunked else adam,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    ).double()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": count}.items():
            patch.setenv(key, str(value))
        settings = {"callbacks": [FiniteWeights(), WriteMatches(folder / name)]}
        trainer = trainer_on(groups, max_steps=steps, **settings)
        trainer.fit(sae, loader, ckpt_path=start and folder / start, weights_only=True)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trainer.predict(sae, loader, return_predictions=False)
        (measured,) = trainer.test(sae, loader, verbose=False)
    assert (sae.layout.share.mesh is None) == (count == 1)
    return measured


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_checkpoint_can_be_shared_out_anew(tmp_path: Path):
    def fit_on(count: int, name: str, **settings: Any) -> list[dict[str, float]]:
        act = partial(fit, folder=tmp_path, name=name, **settings)
        return run_on(count, act) if count > 1 else [act(0)]

    fit_on(2, "two", steps=4)
    fit_on(1, "same", steps=4, start="two.ckpt")
    assert_equal_checkpoints(tmp_path, "two", "same")
    (expected,) = fit_on(1, "expected", start="two.ckpt")
    for name, settings in {
        "two-two": {"start": "two.ckpt"},
        "one-two": {"start": "same.ckpt"},
        "in groups": {"start": "same.ckpt", "groups": 2},
        "chunked": {"start": "two.ckpt", "chunked": True},
    }.items():
        for measured in fit_on(2, name, **settings):
            assert measured == pytest.approx(expected, rel=1e-6)
        assert_equal_checkpoints(tmp_path, "expected", name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            f"rank{group}-batch{batch:05d}.safetensors"
            for group in range(settings.get("groups", 1))
            for batch in range(4)
        ]


def assert_equal_checkpoints(folder: Path, one: str, other: str) -> None:
    one, other = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in (one, other))
    assert one.keys() == other.keys()
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(other[part], one[part], rtol=1e-6, atol=1e-8)


CONFIGURATION = """--config feature_choice.yaml
    --model.n_features 512 --model.dead_after_tokens 1000
    --data.batch_size 512 --data.batches_per_block 4
    --data.validation_tokens 1024 --data.test_tokens 1024
    --trainer.accelerator cpu --trainer.enable_progress_bar false"""
FIT = "--model.mutual_choice_share 0.5 --trainer.max_steps 6 --trainer.val_check_interval 6"
SHARED = "--config trainer/feature_sharded.yaml"


def command(folder: Path, subcommand: str, *options: str) -> str:
    folder.mkdir(exist_ok=True)
    run = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "lightning_sae", subcommand, *" ".join(options).split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_command_line_shares_out_features(tmp_path: Path):
    command(tmp_path, "fit", CONFIGURATION, FIT, SHARED)
    sae = FeatureChoiceSAE.load_from_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert sae.choosing
    assert int(sae.history.tokens_seen) == 6 * 512


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda whole: whole[:-100], "is no checkpoint of an SAE, or is damaged"),
        (lambda whole: whole, "TopKSAE(d_model=256, n_features=8), the configuration asks for"),
    ],
    ids=["damaged", "of another architecture"],
)
def test_a_checkpoint_that_cannot_be_loaded_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    told: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    path = tmp_path / "last.ckpt"
    state = TopKSAE(256, 8, 3).state_dict()
    torch.save(
        {"loops": {}, KEY: FORMAT, "architecture": "TopKSAE", "state_dict": state},
        path,
    )
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match=re.escape(told)):
        main(["test", *f"{CONFIGURATION} {SHARED} --ckpt_path {path}".split()])


@pytest.mark.slow
def test_the_command_line_does_the_same_on_two_processes(tmp_path: Path):
    paths, figures = {}, {}
    for name, overlay in {"one": "", "two": SHARED}.items():
        command(tmp_path / name, "fit", CONFIGURATION, FIT, overlay)
        paths[name] = next((tmp_path / name).rglob("last.ckpt"))
    one, two = (torch.load(path, weights_only=True)["state_dict"] for path in paths.values())
    # Float32 counts one token more or less above a threshold, which then moves by so much more.
    torch.testing.assert_close(two.pop("threshold"), one.pop("threshold"), rtol=0.02, atol=0)
    # Adam makes a step of the noise in a gradient near zero, so that single weights stray further.
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-4)
    for name, tensor in one.items():
        distance = torch.linalg.vector_norm(two[name].double() - tensor.double())
        assert distance <= 1e-5 * torch.linalg.vector_norm(tensor.double()), name
    for subcommand in ("validate", "test", "predict"):
        for name, overlay in {"one": "", "two": SHARED}.items():
            where = f"--ckpt_path {paths['two']}"
            figures[name] = command(tmp_path / name, subcommand, CONFIGURATION, overlay, where)
        found, expected = ([float(n) for n in re.findall(r"\d\.\d+", t)] for t in figures.values())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found or subcommand == "predict"
    written = [path.name for path in tmp_path.rglob("rank*.safetensors")]
    assert written == 2 * ["rank0-batch00000.safetensors"]


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_two_processes(tmp_path: Path):
    command(tmp_path, "fit", CONFIGURATION, FIT, SHARED)
    path = next(tmp_path.rglob("last.ckpt"))
    more = "--trainer.max_steps 8 --trainer.val_check_interval 8"
    for name, overlay in {"one": "", "two": SHARED}.items():
        command(tmp_path / name, "fit", CONFIGURATION, FIT, overlay, more, f"--ckpt_path {path}")
    one, two = (
        torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True)
        for name in ("one", "two")
    )
    assert one["global_step"] == two["global_step"] == 8
    for each in (one, two):
        del each["state_dict"]["threshold"]
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-5, atol=1e-5)
