"""SIGTERM and SIGINT: `fit` ends after the step under way, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_sae.parallel.legacy import max_over_processes

__all__ = ["StopOnSignal", "exit_on_signals"]

STOP = (signal.SIGTERM, signal.SIGINT)
REQUEUE = getattr(signal, "SIGUSR1", signal.SIGTERM)  # there is none on Windows


class StopOnSignal(pl.Callback):
    """Stops training on SIGTERM or SIGINT, saves a checkpoint, and exits with 143 or 130.

    Training stops after the optimizer step under way, so with gradient accumulation after the
    last of its batches; a validation under way is given up after its batch. That takes as long
    as one step, and the reading of a block of activations if that is what comes next. Every
    `ModelCheckpoint` then saves as it does on its schedule: a run resumed from there goes on bit
    for bit. A signal that reaches one rank stops them all, at the same step.

    Under SLURM, Lightning saves `hpc_ckpt_N.ckpt` and asks for the job to be queued again when it
    is sent SIGUSR1 (`#SBATCH --signal=SIGUSR1@90`); started again with the same command, in the
    same folder, it goes on from there. That handler, too, waits here for the end of the step.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal's number
        self._requeue: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over from Lightning's handlers, which act in the middle of a step."""
        _handle(STOP, self._note)
        if callable(signal.getsignal(REQUEUE)):
            self._requeue = _handle((REQUEUE,), self._note).get(REQUEUE)

    def _note(self, number: int, frame: Any) -> None:
        if self._received not in STOP:
            self._received = number

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop here if no gradients are left over that a checkpoint would lose."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._act(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Stop after this batch; after the last one, the next step counts itself correctly."""
        if batch_idx + 1 < sum(trainer.num_val_batches):
            self._act(trainer)

    def _act(self, trainer: pl.Trainer) -> None:
        device, seen = trainer.strategy.root_device, self._received
        number = int(max_over_processes(torch.tensor(seen, device=device)))
        if number == REQUEUE and self._requeue:
            if self._received == seen:  # else one came meanwhile, and waits for the next step
                self._received = 0
            self._requeue(number, None)
        elif number:  # Lightning raises SIGTERMException once it has logged the step
            self._received = number
            trainer._signal_connector.received_sigterm = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Have checkpoints saved, by the callbacks that come after, if this is our exception."""
        if isinstance(exception, SIGTERMException):
            number = self._received or signal.SIGTERM  # if Lightning's own handler was first
            exception.code = 128 + number
            exception.args = (f"stopped by {signal.Signals(number).name}",)
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = True


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Exit with 143 on SIGTERM and with 130 on SIGINT, at once but with `finally` clauses run."""
    before = _handle(STOP, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(numbers: tuple[int, ...], handler: Callable[[int, Any], object]) -> dict[int, Any]:
    """Set the handler of signals; return those they had. Only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}
