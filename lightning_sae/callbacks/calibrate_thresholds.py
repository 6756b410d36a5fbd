"""Thresholds that keep to the budget exactly, at the end of training."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sae.callbacks.find_sae import find_saes
from lightning_sae.checks import require_positive
from lightning_sae.data.batches import activations_in
from lightning_sae.parallel import Ranks, ranks_of
from lightning_sae.part import part_of


class CalibrateThresholds(Callback):
    """Calibrates the SAE's thresholds on held-out tokens, right after the last training step.

    Training keeps thresholds to its own text, and other text has other numbers of matches a token:
    in two runs on the shipped model 5 % more than k, and 3 % fewer. After this there are k on
    average, and the last checkpoint and validation have these thresholds. A line says how many
    there were before. Feature Choice's are all multiplied by one factor.

    Architectures with thresholds bring this callback along. It needs a set number of steps,
    validation data whose batches are activations, and an SAE with a method
    `calibrate(activations)`, which may be a part of the module that is trained. Where one of them
    is missing nothing happens.

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
        saes = find_saes(pl_module, "match", of=self)
        saes = [sae for sae in saes if hasattr(sae, "calibrate")]
        if not saes:
            return
        loaders: Any = trainer.val_dataloaders or ()
        x: list[Tensor] = []
        for held_out in loaders[0] if isinstance(loaders, list) else loaders:
            x.append(activations_in(held_out).to(pl_module.device))
            if sum(map(len, x)) * ranks_of(trainer).size >= self.tokens:
                break
        for sae in saes if x else ():
            own = torch.cat([part_of(sae).of(each) for each in x])
            _calibrate(sae, own, ranks_of(trainer))


def calibration(trainer: Any) -> list[Callback]:
    """Return what an architecture with thresholds brings along, unless a Trainer has one."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])  # Fabric's has none
    given = any(isinstance(callback, CalibrateThresholds) for callback in callbacks)
    return [] if given else [CalibrateThresholds()]


def _calibrate(sae: Any, x: Tensor, ranks: Ranks) -> None:
    tokens = ranks.count(x, x.device)
    before = ranks.count(sae.match(x).token, x.device) / tokens
    sae.calibrate(x)
    after = ranks.count(sae.match(x).token, x.device) / tokens
    whose = (name := part_of(sae).name) and f" of {name}"
    rank_zero_info(
        f"Thresholds{whose} were calibrated on {tokens:,} held-out tokens, which had {before:.2f} "
        f"matches each before and have {after:.2f} now"
    )
