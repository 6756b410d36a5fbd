"""Time contenders in turn in one process, on one GPU, by the GPU's own clock.

As `rounds`, of which contenders are the same functions, but each has a thread instead of a process,
so that all use one context of the GPU and one allocator. Exactly one of them is at work at a time.
A turn is several steps, for which the CPU may run ahead of the GPU as it does in training; events
of CUDA are recorded before the first of them and after the last.
"""

import gc
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import ENDLESS, Contender, Outcome, Size, Step


class Stopped(BaseException):
    """Ends a training loop from within."""


class Turns:
    """Batches for a contender, handed out while it is its turn; what `Feed` is to a process."""

    def __init__(self, size: Size, batches: Sequence[Any], device: str, precision: str) -> None:
        self.size = size
        self.device = device
        self.before_step: Callable[[], None] | None = None
        """Called before each step."""
        self.seconds = 0.0
        """What the last turn took."""
        self.left = 0
        """Steps of this turn that are still to be taken; -1 ends the training."""
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self._precision = precision
        self._batches = itertools.cycle(batches)
        self._stop_clock: Callable[[], float] | None = None

    def imported(self) -> None:
        """Do nothing: memory is not told apart within a process."""

    def lap(self, name: str) -> None:
        """Do nothing: the CPU would wait for the GPU within a step."""

    def __len__(self) -> int:
        return ENDLESS  # a Trainer fetches ahead from what has no length

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.left == 0 and self._stop_clock is not None:
            self.seconds = self._stop_clock()
            self._stop_clock = None
            self.done.release()
            self.go.acquire()
        if self.left < 0:
            raise Stopped
        if self._stop_clock is None:
            # Of float32 products. Libraries set it for the whole process.
            torch.set_float32_matmul_precision(self._precision)
            self._stop_clock = started(self.device)
        if self.before_step:
            self.before_step()
        self.left -= 1
        return next(self._batches)


def started(device: str) -> Callable[[], float]:
    """Start a clock; return what stops it and returns the seconds that the device took."""
    if device == "cpu":
        begin = time.process_time()
        return lambda: time.process_time() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def stop() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return stop


def take_turns(
    contenders: Sequence[tuple[Contender, str]],
    batches: Sequence[Any],
    *,
    rounds: int,
    steps: int,
    device: str,
    logs: Path,
) -> Outcome:
    """Let each contender take some steps a round, in another order each time.

    Args:
        contenders: Who takes part, and the precision of float32 products meanwhile.
        batches: What they train on, again and again, on the device.
        rounds: Turns of each; one before them is not counted.
        steps: Steps of a turn.
        device: Where they train, "cpu" or "cuda".
        logs: Folder for what they print.

    Returns:
        The mean time of a step in each turn, and why other contenders could not be run.
    """
    logs.mkdir(parents=True, exist_ok=True)
    workers = [
        _Worker(contender, Turns(contender.size, batches, device, precision))
        for contender, precision in contenders
    ]
    taken: dict[str, list[Step]] = {worker.name: [] for worker in workers}
    # All of them print to one file: what a thread prints cannot be told from what another does.
    with (logs / "gpu.txt").open("a") as file, redirect_stdout(file), redirect_stderr(file):
        for number in range(-1, rounds):
            first = max(number, 0) * len(workers) // rounds
            for worker in workers[first:] + workers[:first]:
                seconds = worker.turn(steps)
                if seconds is not None and number >= 0:
                    taken[worker.name].append(Step(seconds / steps, 0, {}))
        for worker in workers:
            worker.stop()
    failures = {worker.name: worker.failure for worker in workers if worker.failure}
    del workers
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return Outcome({n: of for n, of in taken.items() if n not in failures}, failures)


class _Worker:
    """A contender at work in its own thread."""

    def __init__(self, contender: Contender, turns: Turns) -> None:
        self.name = contender.name
        self.failure = ""
        self._turns = turns
        self._thread = threading.Thread(target=self._work, args=(contender,), daemon=True)
        self._thread.start()

    def turn(self, steps: int) -> float | None:
        """Let the contender take some steps; return their seconds, or None if it failed."""
        if self.failure:
            return None
        self._turns.left = steps
        self._turns.go.release()
        self._turns.done.acquire()
        return None if self.failure else self._turns.seconds

    def stop(self) -> None:
        """End its training."""
        self._turns.left = -1
        self._turns.go.release()
        self._thread.join()

    def _work(self, contender: Contender) -> None:
        self._turns.go.acquire()  # nothing is imported or allocated before its turn
        try:
            torch.manual_seed(0)
            contender.train(self._turns, **contender.options)
        except Stopped:
            pass
        except BaseException as error:
            traceback.print_exc()
            told = str(error).strip().splitlines() or [""]
            self.failure = f"{type(error).__name__}: {told[0]}"
        self._turns.done.release()
