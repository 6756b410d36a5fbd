"""What a run shows on the terminal, in place of what Lightning shows of any network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sae.callbacks import RichStepsBar, TQDMStepsBar

__all__ = ["OneLineSummary", "show_steps"]


class OneLineSummary(ModelSummary):
    """Says in one line what is trained: there are no layers to list, and no FLOPs to be counted."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it."""
        parameters = sum(each.numel() for each in pl_module.parameters())
        hparams: Any = pl_module.hparams
        names = [name for name in ("d_model", "n_features", "k") if name in hparams]
        sizes = ", ".join(f"{name}={hparams[name]}" for name in names)
        rank_zero_info(f"Training {type(pl_module).__name__}({sizes}), {parameters:,} parameters")


def show_steps(trainer: Any, named: Collection[type]) -> None:
    """Put ours in place of the summary and the bar that Lightning chose by its switches.

    Args:
        trainer: Lightning's.
        named: Classes of callbacks that the user has named, which stay.
    """
    ours = {
        RichProgressBar: RichStepsBar,
        TQDMProgressBar: TQDMStepsBar,
        RichModelSummary: OneLineSummary,
        ModelSummary: OneLineSummary,
    }
    trainer.callbacks = [
        ours[type(each)]() if type(each) in ours and type(each) not in named else each
        for each in trainer.callbacks
    ]
