"""Checkpoints are whole or not there, whatever happens to the process that writes them."""

import copy
import errno
import multiprocessing
import os
import pickle
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_sae import TopKSAE, checkpoint_io
from lightning_sae.checkpoint_format import FORMAT, KEY
from lightning_sae.checkpoint_io import (
    AtomicCheckpointIO,
    open_checkpoint,
    read_checkpoint,
    require_intact,
)
from lightning_sae.checks import UsageError
from tests.faults.runs import same
from tests.faults.saver import SIZE, checkpoint, save_forever

PLACES = ["the same file system", "another one"]


def forkserver() -> Any:
    processes = multiprocessing.get_context("forkserver")  # one import for all of them
    processes.set_forkserver_preload(["tests.faults.saver"])
    return processes


def kill_while_saving(path: Path, times: int) -> int:
    """Kill a process `times` times while it saves to a path; return how often that tore a save."""
    processes = forkserver()
    delay = random.Random(0)  # noqa: S311 - not a secret
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), path)
    torn = last = 0
    killed: set[int | None] = set()
    for _ in range(times):
        process = processes.Process(target=save_forever, args=(path, last + 1))
        process.start()
        before, waited = path.stat().st_ino, time.monotonic()
        while path.stat().st_ino == before and time.monotonic() - waited < 60:
            time.sleep(0.001)  # until it is up and saving
        time.sleep(delay.uniform(0, 0.03))
        process.kill()
        process.join()
        killed.add(process.pid)
        saved = torch.load(path, weights_only=True)
        assert saved["number"] > last
        weights = torch.full((SIZE,), float(saved["number"]))
        assert torch.equal(saved["state_dict"]["W_dec"], weights)
        last = saved["number"]
        temporaries = set(path.parent.iterdir()) - {path}
        assert len(temporaries) <= 1
        # Of an earlier one, if this one was killed between giving the name and tidying up.
        assert all(any(f"-{pid}-" in each.name for pid in killed) for each in temporaries)
        torn += len(temporaries)
    return torn


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(times: int, place: str, tmp_path: Path, monkeypatch):
    if place == PLACES[1]:
        monkeypatch.setenv("TMPDIR", "/dev/shm")  # noqa: S108 - that is the point
    torn = kill_while_saving(tmp_path / "last.ckpt", times)
    assert torn > 0  # else the test has tested nothing
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == [tmp_path / "last.ckpt"]


def test_it_saves_what_lightning_loads(tmp_path: Path):
    path = tmp_path / "new" / "folders" / "last.ckpt"
    io = AtomicCheckpointIO()
    for number in (1, 2):
        io.save_checkpoint(checkpoint(number), path)
        assert io.load_checkpoint(path, weights_only=True)["number"] == number
    io.save_checkpoint(checkpoint(3), str(path))
    assert list(path.parent.iterdir()) == [path]
    io.save_checkpoint(checkpoint(4), f"memory://{path}")  # Lightning's own way
    assert io.load_checkpoint(f"memory://{path}", weights_only=True)["number"] == 4
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, path, storage_options={})


def told(reason: str, path: Path | str) -> str:
    return f"the checkpoint cannot be written: {reason}: '{path}'"


@pytest.mark.parametrize("size", [10, SIZE])
def test_a_full_disk(size: int, tmp_path: Path, monkeypatch):
    path, temporary = tmp_path / "last.ckpt", tmp_path / "full.tmp"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    temporary.symlink_to("/dev/full")  # to which every write fails as to a full disk
    monkeypatch.setattr(checkpoint_io, "temporary_of", lambda target: temporary)
    with pytest.raises(OSError, match=told("No space left on device", path)) as error:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(size)}, path)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert torch.load(path, weights_only=True)["number"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late(call: str, tmp_path: Path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=told("Input/output error", path)):
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert torch.load(path, weights_only=True)["number"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file"])
def test_a_folder_that_takes_nothing(folder: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match=told(".*", f"{folder}/last.ckpt")):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), f"{folder}/last.ckpt")


def test_what_cannot_be_pickled_is_a_bug_and_no_matter_of_the_disk(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(Exception, match="lambda") as error:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "hook": lambda: None}, path)
    assert not isinstance(error.value, OSError)
    assert list(tmp_path.iterdir()) == []


def test_two_savers_of_one_name_do_not_tear_it(tmp_path: Path):
    path, numbers = tmp_path / "last.ckpt", set()
    savers = [forkserver().Process(target=save_forever, args=(path, 1)) for _ in range(2)]
    for saver in savers:
        saver.start()
    while len(numbers) < 30:
        assert [saver.exitcode for saver in savers] == [None, None]  # else in vain
        if path.exists():
            saved = torch.load(path, weights_only=True)
            numbers.add(saved["number"])
            assert bool((saved["state_dict"]["W_dec"] == saved["number"]).all())
    for saver in savers:
        saver.kill()
        saver.join()
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), path)
    assert list(tmp_path.iterdir()) == [path]


class Parent(pl.LightningModule):
    """A module of someone else's: with an SAE as a child, or without one."""

    def __init__(self, child: torch.nn.Module) -> None:
        super().__init__()
        self.child = child
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.head(self.child(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("child", [torch.nn.Linear(4, 4), TopKSAE(4, 8, k=2)])
def test_any_module_is_saved_and_resumed(child: torch.nn.Module, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(4, 4)), batch_size=4
    )

    def trainer(steps: int) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            plugins=[AtomicCheckpointIO()],
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    first = trainer(1)
    first.fit(Parent(child), data)
    first.save_checkpoint(path)
    saved = {name: value.clone() for name, value in first.model.state_dict().items()}
    resumed, again = trainer(1), Parent(copy.deepcopy(child))
    resumed.fit(again, data, ckpt_path=path)
    assert resumed.global_step == 1
    assert same(again.state_dict(), saved)


def test_a_file_is_read_without_running_what_is_in_it_unless_told(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "hparams": Path("x")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(path)
    found = AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert found["hparams"] == Path("x")


def test_a_checkpoint_of_something_else_is_told_from_that_of_an_sae(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    for child in (TopKSAE(4, 8, k=2), torch.nn.Linear(4, 4)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": Parent(child).state_dict()}, path)
        with pytest.raises(UsageError, match=r"last.ckpt is no checkpoint of an SAE"):
            read_checkpoint(path)
    state = TopKSAE(4, 8, k=2).state_dict()
    AtomicCheckpointIO().save_checkpoint({"state_dict": state}, path)
    assert same(dict(read_checkpoint(path)["state_dict"]), dict(state))
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_an_earlier_format_is_read_and_written_as_the_present_one(tmp_path: Path):
    old = Path(__file__).parent / "checkpoints_format_1" / "topk.ckpt"
    found = AtomicCheckpointIO().load_checkpoint(old)
    assert found[KEY] == FORMAT
    assert "decoder.weight" in found["state_dict"]
    AtomicCheckpointIO().save_checkpoint(found, tmp_path / "new.ckpt")
    new = open_checkpoint(tmp_path / "new.ckpt")  # in its own format
    assert new[KEY] == FORMAT
    assert KEY not in open_checkpoint(old)
    assert same(dict(new["state_dict"]), dict(found["state_dict"]))
    AtomicCheckpointIO().save_checkpoint({KEY: FORMAT + 1}, tmp_path / "later.ckpt")
    with pytest.raises(UsageError, match=f"the checkpoint has {KEY}={FORMAT + 1}"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "later.ckpt")


def large_checkpoint(path: Path) -> Path:
    weights = torch.arange(64 * 1024, dtype=torch.float32)
    torch.save({"loops": {}, "state_dict": {"W_dec": weights}}, path)
    return path


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    path = large_checkpoint(tmp_path / "last.ckpt")
    require_intact(path)
    whole = path.read_bytes()
    draw = random.Random(0)  # noqa: S311 - not a secret
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    for _ in range(30):  # in the weights, where nothing else would tell
        place = largest.header_offset + 200 + draw.randrange(largest.file_size - 200)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"last.ckpt is no checkpoint, or is damaged"):
            require_intact(path)
        with pytest.raises(UsageError, match=r"last.ckpt is no checkpoint, or is damaged"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_every_cut_is_noticed(tmp_path: Path):
    path = large_checkpoint(tmp_path / "last.ckpt")
    whole = path.read_bytes()
    draw = random.Random(0)  # noqa: S311 - not a secret
    for length in [0, 1, 100, len(whole) - 1, *draw.sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        for read in (require_intact, open_checkpoint):
            with pytest.raises(UsageError, match="is damaged"):
                read(path)


def test_damage_anywhere_is_told_or_harmless(tmp_path: Path):
    path = large_checkpoint(tmp_path / "last.ckpt")
    whole, weights = path.read_bytes(), torch.load(path, weights_only=True)["state_dict"]["W_dec"]
    draw = random.Random(0)  # noqa: S311 - not a secret
    for _ in range(200):
        damaged = bytearray(whole)
        place = draw.choice((draw.randrange(2000), len(whole) - 1 - draw.randrange(2000)))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            require_intact(path)
            found = open_checkpoint(path)
        except UsageError as error:
            assert "is damaged" in str(error)  # noqa: PT017 - either is right
        else:  # padding, or a name that is not used
            assert torch.equal(found["state_dict"]["W_dec"], weights)
