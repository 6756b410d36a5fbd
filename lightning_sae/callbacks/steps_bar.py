"""Progress bars of runs that are so many steps long, as streams of activations have them."""

from __future__ import annotations

import math
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_sae.callbacks.find_sae import trained_together
from lightning_sae.part import part_of

SHOWN: Final = {
    "train/loss": "loss",
    "train/l0": "L0",
    "train/dead_fraction": "dead",
    "train/tokens_per_second": "tokens/s",
}
"""What is shown of what is logged with `prog_bar=True`, and what it is called there."""


class _Steps(ProgressBar):
    """Counts optimizer steps over the whole run, and shows what an SAE is watched by."""

    @property
    def total_train_batches(self) -> int | float:
        """Return the steps of the run, or infinity."""
        return self.trainer.estimated_stepping_batches

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show how many steps were made: also where gradients accumulate, or a run is resumed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what is shown, by short names; not the number of the run. Of several, the mean."""
        found = trainer.progress_bar_metrics
        shown = {key: found[key] for key in SHOWN if key in found}
        for key in SHOWN.keys() - shown.keys():  # of several SAEs that are trained together
            curves = (part_of(each).curve(key) for each in trained_together(pl_module))
            if values := [found[curve] for curve in curves if curve in found]:
                shown[key] = sum(values) / len(values)
        return {name: _short(shown[key]) for key, name in SHOWN.items() if key in shown}


class RichStepsBar(_Steps, RichProgressBar):
    """A bar by `rich` that counts optimizer steps and shows loss, L0, dead share and tokens/s."""

    def _get_train_description(self, current_epoch: int) -> str:
        """Say what is counted. Private of Lightning's, which says `Epoch 0/-2` of a stream."""
        return "Step".ljust(len(self.validation_description))


class TQDMStepsBar(_Steps, TQDMProgressBar):
    """The same as plain text, for where `rich` is not installed."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Say what is counted."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("Step")


def _short(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1e4 else f"{value:.4g}"
