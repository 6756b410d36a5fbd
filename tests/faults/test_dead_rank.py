"""A process that is killed, or hangs: the others end, and the run goes on bit for bit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_sae.cli.errors import one_line_errors
from tests.faults.runs import checkpoints, command, processes, same, state
from tests.faults.test_last_checkpoint import EVERY_TWO_STEPS

SETTINGS: dict[str, Any] = {
    "trainer__max_steps": 40,
    "trainer__val_check_interval": 20,
    "trainer__callbacks": EVERY_TWO_STEPS,
    "trainer__accelerator": "cpu",
}
TWO: dict[str, Any] = {
    "trainer__devices": 2,
    "trainer__strategy": "DDPStrategy",
    "trainer__strategy__timeout": "0:03:00",
}
KILL, HANG = signal.SIGKILL, signal.SIGSTOP
Fit = Callable[..., subprocess.Popen]


@pytest.fixture
def fit(text: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Starts a run in a new folder, which then has what it says in the file `said`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def start(folder: Path, **settings: Any) -> subprocess.Popen:
        folder.mkdir()
        line = command(data__text=text, **SETTINGS, **settings)
        with (folder / "said").open("w") as said:
            return subprocess.Popen(line, cwd=folder, stderr=said)  # noqa: S603 - ours

    return start


def last(folder: Path) -> Path:
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "victim", "number"),
    [({}, 0, KILL), (TWO, 0, KILL), (TWO, 1, KILL), (TWO, 1, HANG)],
    ids=["the only one", "the first of two", "the second of two", "the second of two hangs"],
)
def test_a_run_survives_its_processes(settings, victim, number, fit: Fit, tmp_path: Path):
    whole, cut, resumed = (tmp_path / name for name in ("whole", "cut", "resumed"))
    assert fit(whole, **settings).wait(300) == 0
    process = fit(cut, **settings)
    while not list(cut.rglob("last.ckpt")) and process.poll() is None:
        time.sleep(0.05)
    ranks = [process.pid, *(each for each in processes(cut) if each != process.pid)]
    os.kill(ranks[victim], number)
    start = time.monotonic()
    while (left := processes(cut)) and not (number == HANG and left == [ranks[victim]]):
        assert time.monotonic() - start < (240 if number == HANG else 30)
        time.sleep(0.1)
    for process_id in left:
        os.kill(process_id, KILL)
    assert process.wait(10) not in (0, 143)
    assert "Traceback" not in (cut / "said").read_text()

    steps = [state(path)["global_step"] for path in checkpoints(cut)]  # all can be read
    assert 0 < max(steps) < SETTINGS["trainer__max_steps"]
    assert fit(resumed, **settings, ckpt_path=last(cut)).wait(300) == 0
    assert same(state(last(resumed)), state(last(whole)))


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: x.cpp:1, unhandled system error"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Read error\nmore"),
    ],
)
def test_a_rank_that_is_gone_is_told(error: Exception):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise error
    expected = "lightning_sae: error: another process of the run has ended, or hangs: "
    assert exit_.value.code == expected + str(error).splitlines()[0]
