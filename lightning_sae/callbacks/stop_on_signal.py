"""SIGTERM and SIGINT: `fit` ends after the step under way, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_sae.parallel.ranks import all_reduce

__all__ = ["STOP", "StopOnSignal", "set_handler"]

STOP = (signal.SIGTERM, signal.SIGINT)
"""Signals that end a run."""

REQUEUE = getattr(signal, "SIGUSR1", signal.SIGTERM)  # there is none on Windows


class StopOnSignal(pl.Callback):
    """Stops training on SIGTERM or SIGINT, saves a checkpoint, and exits with 143 or 130.

    Training stops after the optimizer step under way, so with gradient accumulation after the
    last of its batches; a validation after a step is given up after its batch. That takes as long
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
        self._received, self._requeue = 0, None  # this may be another run
        set_handler(STOP, self._note)
        if callable(signal.getsignal(REQUEUE)):
            self._requeue = set_handler((REQUEUE,), self._note).get(REQUEUE)

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
        if _is_between_steps(trainer):
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
        if batch_idx + 1 < sum(trainer.num_val_batches) and _is_between_steps(trainer):
            self._act(trainer)

    def _act(self, trainer: pl.Trainer) -> None:
        device, seen = trainer.strategy.root_device, self._received
        number = int(all_reduce(torch.tensor(seen, device=device), "max"))
        if number == REQUEUE and self._requeue:
            if self._received == seen:  # else one came meanwhile, and waits for the next step
                self._received = 0
            self._requeue(number, None)
        elif number:
            self._received = number
            # Private: Lightning raises SIGTERMException for it once it has logged the step, while
            # what is public, to raise that here, loses the step's log.
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


def _is_between_steps(trainer: pl.Trainer) -> bool:
    """Return whether no gradients are left over from the last training batch."""
    return (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


def set_handler(numbers: tuple[int, ...], handler: Callable[[int, Any], object]) -> dict[int, Any]:
    """Set the handler of signals, in a main thread: no other can.

    Returns:
        The handlers that they had, by their numbers; of other threads none.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}
