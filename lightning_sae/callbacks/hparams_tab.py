"""TensorBoard's HPARAMS tab: what runs were made with, beside what came of them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sae.callbacks.drawing import tensorboards


class HParamsTab(Callback):
    """Fills TensorBoard's HPARAMS tab when training ends, to compare runs in a table.

    Hyperparameters are those that Lightning gives the logger, and the optimizer, its learning rate,
    the steps and the data module's `batch_size`. Figures are all that were logged under `val/`, or
    under `train/` where nothing was; their values are the last ones of their curves. It works with
    any module.

    Lightning fills the tab only if it is given figures when a run begins, and has none by then.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill it, on the first rank."""
        names = list(trainer.callback_metrics)
        found = [name for name in names if name.startswith("val/")]
        figures = dict.fromkeys(found or [name for name in names if name.startswith("train/")], 0.0)
        loggers = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        for logger, board in zip(loggers, tensorboards(trainer), strict=False):  # none elsewhere
            # Here, since it imports TensorBoard. The public `add_hparams` begins a run of its own,
            # and Lightning's `log_hyperparams` adds a point to each curve.
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(_hyperparameters(trainer, logger), figures):
                board.file_writer.add_summary(summary)
            board.flush()


def _hyperparameters(trainer: Any, logger: TensorBoardLogger) -> dict[str, Any]:
    """Return hyperparameters in the types that TensorBoard knows."""
    found = dict(logger.hparams) | {"max_steps": trainer.max_steps}
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        found |= {"optimizer": type(optimizer).__name__, "lr": group.get("initial_lr", group["lr"])}
    batch_size = getattr(trainer.datamodule, "batch_size", None)
    found |= {} if batch_size is None else {"batch_size": batch_size}
    known = bool | int | float | str
    return {name: v if isinstance(v, known) else str(v) for name, v in found.items()}
