"""No checkpoint of weights that are broken."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.numerics import widest_float


class FiniteWeights(Callback):
    """Refuses to save weights that have become NaN or infinite: the last checkpoint is a good one.

    Else a step that breaks them could be saved before the next one notices. It works with any
    LightningModule, and looks at all of its parameters that are real or complex numbers.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the weights.

        Raises:
            ValueError: If they are not finite; the message names the parameter.
        """
        for name, parameter in pl_module.named_parameters():
            complex_ = parameter.is_complex()
            weights: Tensor = torch.view_as_real(parameter) if complex_ else parameter
            if not weights.is_floating_point() or weights.numel() == 0:
                continue
            if weights.dim() > 1:  # else the sum would copy all of them in float64
                dims = tuple(range(1, weights.dim()))
                weights = torch.linalg.vector_norm(weights, ord=torch.inf, dim=dims)
            # NaN and infinity survive a sum, over processes too; NaN not a maximum over those.
            if not bool(weights.sum(dtype=widest_float(weights.device)).isfinite()):
                raise UsageError(
                    f"{name} has NaN or Inf after {trainer.global_step} steps, which is not saved: "
                    "lower the learning rate, and go on from an earlier checkpoint"
                )
