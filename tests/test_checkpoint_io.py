"""Checkpoints are whole or not there, whatever happens to the process that writes them."""

import errno
import multiprocessing
import os
import random
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_sae.checkpoint_io import AtomicCheckpointIO, check_checkpoint
from tests.faults.saver import SIZE, checkpoint, save_forever

PLACES = ["the same file system", "another one"]


def kill_while_saving(path: Path, times: int) -> int:
    """Kill a process `times` times while it saves to a path; return how often that tore a save."""
    processes = multiprocessing.get_context("forkserver")  # one import for all of them
    processes.set_forkserver_preload(["tests.faults.saver"])
    delay = random.Random(0)  # noqa: S311 - not a secret
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), path)
    torn = last = 0
    for _ in range(times):
        process = processes.Process(target=save_forever, args=(path, last + 1))
        process.start()
        before, waited = path.stat().st_ino, time.monotonic()
        while path.stat().st_ino == before and time.monotonic() - waited < 60:
            time.sleep(0.001)  # until it is up and saving
        time.sleep(delay.uniform(0, 0.03))
        process.kill()
        process.join()
        saved = torch.load(path, weights_only=True)
        assert saved["number"] > last
        weights = torch.full((SIZE,), float(saved["number"]))
        assert torch.equal(saved["state_dict"]["W_dec"], weights)
        last = saved["number"]
        temporary = path.with_name(f"{path.name}.tmp")
        torn += temporary.exists()
        assert set(path.parent.iterdir()) <= {path, temporary}
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


@pytest.mark.parametrize("size", [10, SIZE])
def test_a_full_disk(size: int, tmp_path: Path):
    path, temporary = tmp_path / "last.ckpt", tmp_path / "last.ckpt.tmp"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    temporary.symlink_to("/dev/full")  # to which every write fails as to a full disk
    with pytest.raises(OSError, match=r"last.ckpt cannot be written: .* No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(size)}, path)
    assert torch.load(path, weights_only=True)["number"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late(call: str, tmp_path: Path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"last.ckpt cannot be written: .* Input/output error"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert torch.load(path, weights_only=True)["number"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file"])
def test_a_folder_that_takes_nothing(folder: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match=f"the checkpoint {folder}/last.ckpt cannot be written"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), f"{folder}/last.ckpt")


def sae_checkpoint(path: Path) -> Path:
    weights = torch.arange(64 * 1024, dtype=torch.float32)
    torch.save({"loops": {}, "state_dict": {"W_dec": weights}}, path)
    return path


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    path = sae_checkpoint(tmp_path / "last.ckpt")
    check_checkpoint(path)
    whole = path.read_bytes()
    draw = random.Random(0)  # noqa: S311 - not a secret
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    for _ in range(30):  # in the weights, where nothing else would tell
        place = largest.header_offset + 200 + draw.randrange(largest.file_size - 200)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last.ckpt is no checkpoint of an SAE, or is damage"):
            check_checkpoint(path)


def test_every_cut_is_noticed(tmp_path: Path):
    path = sae_checkpoint(tmp_path / "last.ckpt")
    whole = path.read_bytes()
    draw = random.Random(0)  # noqa: S311 - not a secret
    for length in [0, 1, 100, len(whole) - 1, *draw.sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            check_checkpoint(path)


def test_damage_anywhere_is_told_or_harmless(tmp_path: Path):
    path = sae_checkpoint(tmp_path / "last.ckpt")
    whole, weights = path.read_bytes(), torch.load(path, weights_only=True)["state_dict"]["W_dec"]
    draw = random.Random(0)  # noqa: S311 - not a secret
    for _ in range(200):
        damaged = bytearray(whole)
        place = draw.choice((draw.randrange(2000), len(whole) - 1 - draw.randrange(2000)))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            check_checkpoint(path)
        except ValueError as error:
            assert "is damaged" in str(error)  # noqa: PT017 - either is right
        else:  # padding, or a name that is not used
            assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["W_dec"], weights)
