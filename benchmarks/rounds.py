"""Time contenders in turn, each in a process of its own, a step a round.

A contender is a function that trains from an iterable of batches. The iterable waits until it is
the contender's turn, so that any training loop can be timed as it is, whoever has control of it:
a step is what happens between one batch and the request for the next.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENDLESS = 10**9
"""Steps; the benchmark ends long before."""

BATCHES = 4  # different ones, again and again
STARTING, STEPPING = 600.0, 300.0  # seconds to wait, on a busy machine


@dataclass(frozen=True)
class Size:
    """Tokens of a batch, width of the activations, features, and matches a token."""

    tokens: int
    d_model: int
    n_features: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read `tokens,d_model,n_features,k`."""
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return f"N={self.tokens} d={self.d_model} F={self.n_features} k={self.k}"


@dataclass(frozen=True)
class Contender:
    """A name, the size of the problem, the function that trains, and its options."""

    name: str
    size: Size
    train: Callable[..., None]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Step:
    """What a step took: seconds, peak memory in bytes so far, and the seconds of its parts."""

    seconds: float
    peak: int
    laps: dict[str, float]


@dataclass
class Outcome:
    """Steps by name, one a round; and why other contenders could not be run."""

    steps: dict[str, list[Step]]
    failures: dict[str, str]

    def __or__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.steps | other.steps, self.failures | other.failures)

    def seconds(self, name: str) -> list[float]:
        """Return what each step of a contender took."""
        return [step.seconds for step in self.steps[name]]

    def laps(self, name: str, lap: str) -> list[float]:
        """Return what a part of each step took."""
        return [step.laps[lap] for step in self.steps[name]]

    def peak(self, name: str) -> int:
        """Return a contender's peak memory, above that of its imports, in bytes."""
        return max(step.peak for step in self.steps[name])


class Feed:
    """Batches for a contender, each handed out when it is its turn."""

    def __init__(
        self,
        connection: Connection,
        size: Size,
        batches: Sequence[Any],
        device: str,
        clock: Callable[[], float],
    ) -> None:
        self.size = size
        self.device = device
        self.before_step: Callable[[], None] | None = None
        """Called before each step, outside the time taken."""
        self._connection = connection
        self._batches = batches
        self._clock = clock
        self._handed_out = 0
        self._start = self._lap = 0.0
        self._laps: dict[str, float] = {}
        self._memory = 0

    def imported(self) -> None:
        """Note the memory in use: what is added from here on is the contender's."""
        if self.device != "cpu":
            import torch

            self._memory = torch.cuda.memory_allocated()
            return
        with suppress(OSError):  # without it, the peak of the imports may hide that of a small SAE
            Path("/proc/self/clear_refs").write_text("5")
        self._memory = memory("VmRSS")

    def lap(self, name: str) -> None:
        """Note the time since the last lap, or since the batch was handed out, under a name."""
        now = self._clock()
        self._laps[name] = now - self._lap
        self._lap = now

    def __len__(self) -> int:
        return ENDLESS  # a Trainer fetches ahead from what has no length

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._handed_out:
            seconds = self._clock() - self._start
            peak = _peak(self.device) - self._memory
            self._connection.send(Step(seconds, peak, self._laps))
        else:
            self._connection.send("ready")
        if self._connection.recv() == "stop":
            raise SystemExit
        if self.before_step:
            self.before_step()
        batch = self._batches[self._handed_out % len(self._batches)]
        self._handed_out += 1
        self._laps = {}
        self._start = self._lap = self._clock()
        return batch


def interleave(
    contenders: Sequence[Contender], *, rounds: int, threads: int, device: str, logs: Path
) -> Outcome:
    """Let each contender take a step a round, in another order each time.

    Args:
        contenders: Who takes part.
        rounds: Steps of each; one before them is not counted.
        threads: Threads of each.
        device: Where they train, "cpu" or "cuda".
        logs: Folder for what they print.
    """
    logs.mkdir(parents=True, exist_ok=True)
    # Before torch is imported in the processes, which reads them then.
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    workers = [_Worker(contender, threads, device, logs) for contender in contenders]
    steps: dict[str, list[Step]] = {worker.name: [] for worker in workers}
    try:
        for worker in workers:
            if worker.answer(STARTING):
                worker.step()
            print(f"    {worker.name}: {worker.failure or 'ready'}", flush=True)
        for number in range(rounds):
            start = time.perf_counter()
            first = number * len(workers) // rounds
            for worker in workers[first:] + workers[:first]:
                if step := worker.step():
                    steps[worker.name].append(step)
            seconds = time.perf_counter() - start
            print(f"    round {number + 1} of {rounds}: {seconds:.0f} s", flush=True)
    finally:
        for worker in workers:
            worker.stop()
    failures = {worker.name: worker.failure for worker in workers if worker.failure}
    return Outcome({n: taken for n, taken in steps.items() if n not in failures}, failures)


class _Worker:
    """A contender at work in its own process."""

    def __init__(self, contender: Contender, threads: int, device: str, logs: Path) -> None:
        context = get_context("spawn")  # a fork would inherit the libraries of the others
        self.name = contender.name
        self.failure = ""
        log = logs / f"{contender.name}, {contender.size}.txt"
        self._connection, theirs = context.Pipe()
        arguments = (theirs, contender, threads, device, log)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> Step | None:
        """Let the contender take a step; None if it failed, now or before."""
        if self.failure:
            return None
        with suppress(OSError):  # it is gone: the answer tells
            self._connection.send("go")
        answer: Step | None = self.answer(STEPPING)
        return answer

    def answer(self, timeout: float) -> Any:
        """Wait for what the contender says next; None if it failed."""
        try:
            message = self._connection.recv() if self._connection.poll(timeout) else "no answer"
        except (EOFError, OSError):
            self._process.join()
            message = f"ended with code {self._process.exitcode}"
        if isinstance(message, str) and message != "ready":
            self.failure = message
            return None
        return message

    def stop(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._connection.send("stop")
        self._process.join(10)
        self._process.kill()


def _work(
    connection: Connection, contender: Contender, threads: int, device: str, log: Path
) -> None:
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            import torch

            from benchmarks.activations import draw

            torch.set_num_threads(threads)
            torch.manual_seed(0)
            torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as people train on one
            batches = [batch.to(device) for batch in draw(contender.size, BATCHES)]
            feed = Feed(connection, contender.size, batches, device, _clock(threads, device))
            contender.train(feed, **contender.options)
        except Exception as error:
            traceback.print_exc()
            told = str(error).strip().splitlines() or [""]
            connection.send(f"{type(error).__name__}: {told[0]}")


def _clock(threads: int, device: str) -> Callable[[], float]:
    if device != "cpu":
        return _finished
    # The time that others take of a busy core does not count, where there is only one.
    return time.process_time if threads == 1 else time.perf_counter


def _finished() -> float:
    """Return the time at which the GPU has done what it was given."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _peak(device: str) -> int:
    import torch

    return memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def memory(name: str) -> int:
    """Return a figure of this process's memory in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else 0
