"""What the SAE costs the language model whose activations it was trained on."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sae.metrics import LossRecovered


class LossRecoveredCallback(Callback):
    """Splices reconstructions into the language model, and logs what that does to its loss.

    Under `val/` or `test/`, every value of `lightning_sae.metrics.LossRecovered`:
    `loss_recovered_mean`, `loss_recovered_zero`, `delta_ce`, `kl` and the losses behind them.

    It needs a datamodule with the language model as `residual_stream`, whose batches are mappings
    with `input_ids` and `kept`, both (contexts, length), and a module with the mean activation as
    `input_mean`, (d_model,): `ActivationDataModule` and `SparseAutoencoder` are such. With other
    data it does nothing. Each batch costs four runs of the language model.
    """

    def __init__(self) -> None:
        self._metric = LossRecovered()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on a batch, unless this is only the check before training."""
        if not trainer.sanity_checking:
            self._update(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on a batch."""
        self._update(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(pl_module, "test")

    def _update(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> None:
        if not (isinstance(batch, Mapping) and {"input_ids", "kept"} <= batch.keys()):
            return
        residual_stream = getattr(getattr(trainer, "datamodule", None), "residual_stream", None)
        if residual_stream is not None:
            self._metric.to(pl_module.device).update(
                residual_stream, batch["input_ids"], pl_module, batch["kept"], pl_module.input_mean
            )

    def _log(self, pl_module: pl.LightningModule, stage: str) -> None:
        # Data that is not usable is not usable on any rank, so all ranks return here, or none.
        if not self._metric.update_called:
            return
        values = self._metric.compute()
        self._metric.reset()
        for name, value in values.items():
            pl_module.log(f"{stage}/{name}", value, sync_dist=True)  # equal already: no warning
