"""Thresholds that keep to the budget exactly, at the end of training."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sae.callbacks.find_sae import find_sae
from lightning_sae.checks import require_positive
from lightning_sae.data.batches import activations_in
from lightning_sae.parallel import ranks_of


class CalibrateThresholds(Callback):
    """Calibrates the SAE's thresholds on validation tokens, right after the last training step.

    The last checkpoint and validation then have the calibrated thresholds. Those that training
    keeps are noisier, but of more documents, and a rare feature fires in few: calibrated on 65,536
    tokens, about ten documents, Feature Choice fired 15 % too often on others, and not 1 % by the
    thresholds of training. So this is for validation data of many documents.

    It needs a set number of steps, validation data whose batches are activations, and an SAE with a
    method `calibrate(activations)`, as architectures with thresholds have, which may be a part of
    the module that is trained. An SAE without thresholds is left alone.

    Args:
        tokens: Tokens to calibrate on, over all devices, in whole batches, or all if there are
            fewer. Held in memory.

    Raises:
        ValueError: If `tokens` is not positive.
    """

    def __init__(self, tokens: int = 131_072) -> None:
        require_positive(tokens=tokens)
        self.tokens = tokens

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Calibrate after the last step, and before ModelCheckpoint, which Lightning puts last."""
        if trainer.global_step != trainer.max_steps:
            return
        sae = find_sae(pl_module, "match", of=self)
        if not hasattr(sae, "calibrate"):
            return
        loaders: Any = trainer.val_dataloaders or ()
        x: list[Tensor] = []
        for held_out in loaders[0] if isinstance(loaders, list) else loaders:
            x.append(activations_in(held_out).to(pl_module.device))
            if sum(map(len, x)) * ranks_of(trainer).size >= self.tokens:
                break
        if x:
            sae.calibrate(torch.cat(x))
