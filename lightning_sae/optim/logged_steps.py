"""Curves that reach as far as every checkpoint."""

from typing import Any

import lightning.pytorch as pl

__all__ = ["write_curves"]


def write_curves(trainer: pl.Trainer) -> None:
    """Have loggers write all values up to here, for a checkpoint that is about to get its name.

    A run that is killed goes on from its last checkpoint, and does not log the steps before it
    again. Loggers keep values in memory for a while, and Lightning gives them those of a step only
    after the callbacks that save its checkpoint: here they get them first.

    Args:
        trainer: Of any module, with any loggers.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.processed > batches.completed:
        _log_step(trainer)
    for logger in trainer.loggers:
        logger.save()


def _log_step(trainer: pl.Trainer) -> None:
    """Log the step under way, so that it is not logged again."""
    _ = trainer.callback_metrics, trainer.progress_bar_metrics  # which keep what they have found
    # Private: in public, values can be logged early, but not kept from being logged twice.
    trainer._logger_connector.update_train_step_metrics()
    for value in trainer._results.values() if trainer._results else ():
        value._forward_cache = None  # of a step; means over an epoch go on
