import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from lightning_sae.callbacks.held_folder import hold
from lightning_sae.checks import UsageError


def hold_and_die(folder: Path) -> None:
    with hold(folder, "key"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_one_at_a_time_holds_a_folder(tmp_path: Path):
    with hold(tmp_path, "key"):
        with pytest.raises(UsageError) as error, hold(tmp_path, "key"):
            pass
        assert str(error.value).startswith(f"key={tmp_path}: another run is writing to this folder")
    with hold(tmp_path, "key"):  # again, when the other is over
        assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_nothing(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with hold(tmp_path, "key"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*args: int) -> None:
        raise OSError("of a network file system")

    monkeypatch.setattr("fcntl.flock", unknown)
    with hold(tmp_path, "key"):
        pass
