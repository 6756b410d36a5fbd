"""A signal at any moment: the run ends with a checkpoint that goes on bit for bit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_sae import SparseAutoencoder
from lightning_sae.callbacks import stop_on_signal as signals
from lightning_sae.cli import main
from lightning_sae.data import LanguageModel
from tests.faults.runs import arguments, command, curves, processes, same, state

# Lightning remarks on settings that a six-step run must have.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
TERM, INT = (signal.SIGTERM, 143), (signal.SIGINT, 130)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory):
    """Returns the state and the curves of a run that nothing stopped."""
    known: dict[int, Any] = {}

    def run(accumulate: int) -> Any:
        if accumulate not in known:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                main(arguments(data__text=text, trainer__accumulate_grad_batches=accumulate))
            version = folder / "runs/topk/version_0"
            known[accumulate] = state(version / "checkpoints/last.ckpt"), curves(version)
        return known[accumulate]

    return run


def signal_in(patch: pytest.MonkeyPatch, method: str, call: int, number: int) -> None:
    """Have this process sent a signal in the given call of a method of the SAE."""
    calls = 0
    original = getattr(SparseAutoencoder, method)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    patch.setattr(SparseAutoencoder, method, interrupted)


@pytest.mark.parametrize(
    ("method", "call", "accumulate", "sent", "steps"),
    [
        ("training_step", 2, 1, TERM, 2),
        ("optimizer_step", 5, 1, INT, 5),
        ("training_step", 4, 3, TERM, 2),  # between two optimizer steps, before a validation
        ("training_step", 5, 2, INT, 3),
        ("validation_step", 2, 1, TERM, 3),
        ("validation_step", 2, 1, INT, 3),
        ("on_validation_epoch_end", 1, 1, TERM, 4),
    ],
)
def test_a_run_goes_on_bit_for_bit(
    method, call, accumulate, sent, steps, whole, text, tmp_path, monkeypatch
):
    number, code = sent
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    settings = {"data__text": text, "trainer__accumulate_grad_batches": accumulate}
    with monkeypatch.context() as patch:
        signal_in(patch, method, call, number)
        with pytest.raises(SystemExit) as exit_:
            main(arguments(**settings))
    assert exit_.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    stopped, resumed = (tmp_path / f"runs/topk/version_{version}" for version in (0, 1))
    last = stopped / "checkpoints/last.ckpt"
    assert state(last)["global_step"] == steps

    main(arguments(**settings, ckpt_path=last))
    expected, logged = whole(accumulate)
    assert same(state(resumed / "checkpoints/last.ckpt"), expected)
    again = curves(stopped, resumed)
    given_up = {key for key in logged if key not in again}
    assert again == {key: value for key, value in logged.items() if key not in given_up}
    assert all(name.startswith("val/") for name, _ in given_up)  # of one validation at most
    assert len({step for _, step in given_up}) <= 1


@pytest.mark.parametrize("sent", [TERM, INT])
def test_a_signal_while_ranks_ask_each_other_is_not_lost(sent, text, tmp_path, monkeypatch):
    ask, asked = signals.all_reduce, []

    def interrupted(told: Tensor, reduction: str) -> Tensor:
        asked.append(told)
        if len(asked) == 2:
            signal.raise_signal(sent[0])
        return ask(told, reduction)

    monkeypatch.setattr(signals, "all_reduce", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(arguments(data__text=text))
    assert exit_.value.code == sent[1]
    assert state(tmp_path / "runs/topk/version_0/checkpoints/last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("sent", [TERM, INT])
def test_before_the_first_step_there_is_nothing_to_save(sent, text, tmp_path, monkeypatch):
    signal_in(monkeypatch, "configure_optimizers", 1, sent[0])
    with pytest.raises(SystemExit) as exit_:
        main(arguments(data__text=text))
    assert exit_.value.code == sent[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [TERM, INT])
def test_nobody_waits_for_a_model_that_is_being_loaded(sent, text, tmp_path, monkeypatch):
    loaded = []

    def load(self: LanguageModel) -> Any:
        os.kill(os.getpid(), sent[0])
        time.sleep(2)
        loaded.append(self)
        return original(self)

    original = LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", load)
    with pytest.raises(SystemExit) as exit_:
        main(arguments(data__text=text))
    assert exit_.value.code == sent[1]
    assert not loaded
    assert not list(tmp_path.iterdir())


def test_a_job_is_queued_again_by_slurm(whole, text, tmp_path, monkeypatch):
    """The job is told that its time is up, asks for more, and is stopped; then started again."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (bin_ / "scontrol").chmod(0o755)
    job = {"JOB_ID": 7, "JOB_NAME": "sae", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", 2, signal.SIGUSR1)
        signal_in(patch, "optimizer_step", 4, signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_:
            main(arguments(data__text=text))
    assert exit_.value.code == 143
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert state(tmp_path / "hpc_ckpt_1.ckpt")["global_step"] == 2
    main(arguments(data__text=text))  # the same command
    last = tmp_path / "runs/topk/version_1/checkpoints/last.ckpt"
    assert same(state(last), whole(1)[0])


@pytest.mark.slow
def test_two_tasks_are_queued_again_by_slurm(text, tmp_path, monkeypatch):
    """As above, for two tasks that `srun` starts: both are sent the signal."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    settings = {"data__text": text, "trainer__accelerator": "cpu", "trainer__max_steps": 400}
    settings |= {"trainer__devices": 2, "trainer__strategy": "ddp"}
    settings |= {"trainer__val_check_interval": 20}

    def srun(job: int, folder: Path) -> list[subprocess.Popen]:
        folder.mkdir(exist_ok=True)
        shared = os.environ | {"SLURM_JOB_ID": str(job), "SLURM_JOB_NAME": "sae"}
        shared |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
        return [
            subprocess.Popen(  # noqa: S603 - ours
                command(**settings),
                cwd=folder,
                env=shared | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            )
            for task in range(2)
        ]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [task.wait(300) for task in srun(71, whole)] == [0, 0]
    tasks = srun(72, cut)

    def wait_for(happened: Callable[[], bool]) -> None:
        while not happened():
            assert [task.poll() for task in tasks] == [None, None]  # else in vain
            time.sleep(0.1)

    # Before training has begun Lightning's own handler would save, in each task at another moment.
    wait_for(lambda: bool(list(cut.rglob("*.ckpt"))))
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "asked").exists)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    assert [task.wait(60) for task in tasks] == [143, 143]
    assert (tmp_path / "asked").read_text() == "requeue 72\n"
    assert 0 < state(cut / "hpc_ckpt_1.ckpt")["global_step"] < 400
    assert [task.wait(300) for task in srun(72, cut)] == [0, 0]  # the same command
    ends = [sorted(folder.rglob("last.ckpt"))[-1] for folder in (whole, cut)]
    assert same(*map(state, ends))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("sent", [TERM, INT])
def test_a_process_of_its_own(devices, sent, text, tmp_path, monkeypatch):
    """The whole command, at a moment that chance decides; with two ranks, one is told."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    settings = {"data__text": text, "trainer__max_steps": 100_000}
    settings |= {"trainer__devices": devices, "trainer__val_check_interval": 5}
    if devices > 1:
        settings["trainer__strategy"] = "ddp"
    with subprocess.Popen(command(**settings), stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - ours
        while not list(tmp_path.rglob("events.out.*")) and process.poll() is None:
            time.sleep(0.1)
        time.sleep(10)
        process.send_signal(sent[0])
        start = time.monotonic()
        try:
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()  # if it still runs
    assert process.returncode == sent[1], said
    assert time.monotonic() - start < 30
    assert state(tmp_path / "runs/topk/version_0/checkpoints/last.ckpt")["global_step"] > 0
    assert "Traceback" not in said
    assert not [each for each in processes(tmp_path) if each != os.getpid()]
