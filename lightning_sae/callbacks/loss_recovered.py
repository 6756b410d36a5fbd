"""What the SAE costs the language model whose activations it was trained on."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sae.callbacks.held_out import HeldOutCallback, known_of
from lightning_sae.metrics import LossRecovered
from lightning_sae.metrics.loss_recovered import ablated_losses
from lightning_sae.parallel import Ranks
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.several_sites import SeveralSites


class LossRecoveredCallback(HeldOutCallback):
    """Splices reconstructions into the language model, and logs what that does to its loss.

    Under `val/` or `test/`, every value of `lightning_sae.metrics.LossRecovered`:
    `loss_recovered_mean`, `loss_recovered_zero`, `delta_ce`, `kl` and the losses behind them.

    It needs data as `HeldOutCallback` says, and a module, or a part of it, with the mean activation
    as `input_mean`, (d_model,), as `SparseAutoencoder` has.

    Args:
        tokens: Tokens to measure on, over all devices, in whole contexts. Each is run through the
            language model's blocks after the layer four times, and twice in later validations: what
            ablation costs does not change. That takes longer than the rest of a validation.

    Raises:
        ValueError: If `tokens` is not positive.
    """

    needs: ClassVar[tuple[str, ...]] = ("input_mean",)

    def __init__(self, tokens: int = 65_536) -> None:
        super().__init__(tokens)
        self._metric = LossRecovered()

    def start(self, ranks: Ranks) -> None:
        """Forget what was measured."""
        self._metric = LossRecovered(process_group=ranks.group)

    def measure(self, sae: Any, residual_stream: ResidualStream, batch: Mapping[str, Any]) -> None:
        """Run the language model on a batch, as it is, spliced and ablated."""
        ids, kept = batch["input_ids"], batch["kept"]
        mean = getattr(sae, "mean_activation", sae.input_mean)  # of a transcoder: its target's too
        if isinstance(residual_stream, SeveralSites) and mean is sae.input_mean:
            return  # an SAE of all of them, which cannot be put in place of the first and the last
        known = known_of(batch)
        ablated = self.remembered(
            lambda: ablated_losses(residual_stream, ids, kept, mean, **known),
            *(residual_stream, batch, kept, mean),
        )
        encoded = batch.get("encoded")

        def reconstruct(x: Tensor) -> Tensor:
            # A step may have encoded padding too, or what is not the residual stream as it is.
            if encoded is not None and torch.equal(x, batch["activations"].to(x)):
                return cast(Tensor, encoded.reconstruction)
            return cast(Tensor, sae(x))

        self._metric.to(mean.device).update(
            residual_stream, ids, reconstruct, kept, mean, ablated=ablated, **known
        )

    def log_results(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log what was measured."""
        for name, value in self._metric.to(pl_module.device).compute().items():
            if not value.isnan():  # on all ranks or none, as it is equal: `sync_dist` says no more
                pl_module.log(f"{stage}/{name}", value, sync_dist=True)
