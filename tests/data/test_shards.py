"""What was added is found again, whatever ended the process that added it."""

import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_sae.checks import UsageError
from lightning_sae.data.shards import Shards, bytes_in

ROW = torch.zeros(3, 5).nbytes


def shards(folder, rows=4, limit=float("inf")):
    return Shards(folder, limit, shard_bytes=rows * ROW)


def rows(keys, width=5):
    """Activations that no two keys share, (inputs, 3, width)."""
    return torch.tensor(keys).float()[:, None, None] + torch.arange(3 * width).view(3, width)


def add(into, *keys, width=5, made_of=None):
    into.add(keys, rows(keys, width), {"kept": torch.ones(len(keys), 3).byte()}, made_of or {})


def found(there, *keys):
    return [None if each is None else float(each[0, 0]) for each in there.find(keys)]


def test_files_have_one_size_and_the_rest_waits(tmp_path):
    there = shards(tmp_path)
    add(there, *range(10))
    files = [load_file(file)["activations"] for file in tmp_path.iterdir()]
    assert [len(each) for each in files] == [4, 4]
    assert found(there, 9, 0, 5, 77) == [9, 0, 5, None]
    assert len(there) == 10
    assert found(shards(tmp_path), 0, 7, 8) == [0, 7, None]
    there.write()
    there.write()  # of nothing
    assert found(shards(tmp_path), 0, 7, 8) == [0, 7, 8]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_they_are_of_is_known_before_and_after_they_are_written(tmp_path):
    assert shards(tmp_path).made_of == {}
    for _ in range(2):
        there = shards(tmp_path)
        add(there, 1, made_of={"layer": 3})
        assert there.made_of == {"layer": 3}
        there.write()
        assert there.made_of == {"layer": 3}


def test_what_is_there_is_not_added_again(tmp_path):
    for _ in range(2):
        there = shards(tmp_path)
        add(there, 1, 2, 2, 1)
        add(there, 2, -3)
        there.write()
    assert sum(len(load_file(file)["key"]) for file in tmp_path.iterdir()) == 3
    assert there.holds([1, 2, -3])
    assert not there.holds([1, 3])


def test_what_is_not_alike_goes_into_files_of_its_own(tmp_path):
    there = shards(tmp_path)
    add(there, 1)
    add(there, 2, width=6)
    add(there, 3, width=6, made_of={"layer": 1})
    there.write()
    assert len(list(tmp_path.iterdir())) == 3
    assert [each.shape for each in shards(tmp_path).find([1, 2])] == [(3, 5), (3, 6)]


def test_what_nobody_needs_any_more_is_written(tmp_path):
    there = shards(tmp_path)
    add(there, 1)
    del there
    assert found(shards(tmp_path), 1) == [1]


def test_two_at_a_time_do_each_other_no_harm(tmp_path):
    one, other = shards(tmp_path), shards(tmp_path)
    add(one, 1, 2, 3, 4)
    add(other, 3, 4, 5, 6)
    add(other, 7)
    other.write()
    assert found(one, 1, 5) == [1, 5]
    assert found(other, 5, 1) == [5, 1]
    size = len(list(tmp_path.iterdir()))
    add(one, 5, 6, 7)
    one.write()
    assert len(list(tmp_path.iterdir())) == size  # nobody adds what another has
    add(one, 8, 9)
    assert found(other, 8) == [None]  # in no file yet
    both = shards(tmp_path)
    assert found(both, *range(1, 8)) == list(range(1, 8))
    assert len(both) == 7


def test_beyond_the_limit_no_more_is_kept_and_a_line_says_so(tmp_path):
    there = shards(tmp_path, limit=10**3)
    with pytest.warns(UserWarning, match=r"^cache_limit_gb=1e-06 is reached in '.*': no more"):
        add(there, *range(20))
    assert bytes_in(tmp_path) <= 1.5 * 10**3
    assert found(there, 0, 3, 19) == [0, 3, None]
    there.write()
    size = bytes_in(tmp_path)
    more = shards(tmp_path, rows=99, limit=size + 1)
    add(more, *range(30, 60))
    del more
    gc.collect()  # which writes what is in no file yet
    assert bytes_in(tmp_path) == size


def test_the_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = shards(Path("kept"))
    monkeypatch.chdir("/")
    add(there, 1)
    there.write()
    assert len(shards(tmp_path / "kept")) == 1


def ended_by(way, folder):
    code = f"""
import signal, time
from tests.data.test_shards import add, shards
# Of a shell's background jobs it is ignored, and so of what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
there = shards({str(folder)!r} and __import__("pathlib").Path({str(folder)!r}))
add(there, *range(6))
print("added", flush=True)
if {way!r} == "raise":
    raise RuntimeError
time.sleep({0 if way == "end" else 60})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1)  # noqa: S603
    assert process.stdout.readline() == b"added\n"
    if way in ("kill", "interrupt"):
        process.send_signal(signal.SIGKILL if way == "kill" else signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.parametrize(("way", "left"), [("end", 6), ("raise", 6), ("interrupt", 6), ("kill", 4)])
def test_only_a_kill_loses_what_was_no_whole_file(tmp_path, way, left):
    ended_by(way, tmp_path)
    assert len(shards(tmp_path)) == left
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "short", "long", "garbage", "other"])
def test_damaged_files(tmp_path, damage):
    there = shards(tmp_path)
    add(there, 1, 2, 3, 4)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.unlink()
    if damage == "other":
        save_file({"something": torch.zeros(2)}, file)
    else:
        changed = {
            "empty": b"",
            "short": content[:-3],
            "long": content + b"x",
            "garbage": b"7" * 99,
        }
        file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"^cache_dir: .* is damaged .*; delete it,") as caught:
        shards(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    file.unlink()
    assert len(shards(tmp_path)) == 0


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def full(_tensors, file, metadata):
        file.write_bytes(b"the first part")
        raise error("No space left on device")

    there = shards(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_sae.tensor_files.save_file", full)
        message = r"^cache_dir: cannot write '.*': No space left on device$"
        with pytest.raises(ValueError, match=message):
            add(there, 1, 2, 3, 4)
        assert not list(tmp_path.iterdir())
    there.write()
    assert found(shards(tmp_path), 1) == [1]


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^cache_dir: cannot make '.*file/x': Not a directory$"):
        shards(tmp_path / "file" / "x")


def test_many_files_are_opened_in_no_time(tmp_path):
    there = shards(tmp_path, rows=1)
    add(there, *range(300))
    begun = time.monotonic()
    again = shards(tmp_path)
    assert found(again, *range(300)) == list(range(300))
    assert time.monotonic() - begun < 10
