"""No checkpoint between the batches of one optimizer step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

__all__ = ["WholeSteps"]


class WholeSteps(Callback):
    """Has every `ModelCheckpoint` wait for the end of an optimizer step under way.

    Where gradients accumulate over batches, a checkpoint written after one of them has lost its
    gradient, though it has counted its tokens: a run resumed from there goes another way. Lightning
    writes such ones by the clock, after a validation between two batches of a step, and by
    `every_n_train_steps` after the first batch of a resumed run. `SparseAutoencoder` brings this
    along; it works with any module.
    """

    def __init__(self) -> None:
        self._step = 0  # how many were made when the batch began

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how many steps were made."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Have nothing saved if no step was made: before ModelCheckpoint, which comes last."""
        if trainer.global_step > self._step:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                # Private: what a callback skips a step by that it has saved. In public there is
                # only to override its hooks, in a class that every configuration has to name.
                callback._last_global_step_saved = trainer.global_step
