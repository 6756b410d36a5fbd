"""What an SAE found of features that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sae.callbacks.find_sae import find_sae
from lightning_sae.data import SyntheticDataModule
from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureAbsorption, FeatureClassification, direction_statistics
from lightning_sae.parallel import ranks_of
from lightning_sae.sae import Encoded


class TruthCallback(Callback):
    """Measures features against the true ones, where the data are a `SyntheticDataModule`.

    Under `val/` or `test/`, the figures of `lightning_sae.metrics.direction_statistics`,
    `FeatureClassification` and, where features have parents, `FeatureAbsorption`, of which these
    are the general concepts. With other data it does nothing. The SAE is a module, or a part of it,
    with `match(activations)`, which returns `Matches`, `W_dec`, (n_features, d_model), and
    `scales(activations)`, what these are multiplied by before they are encoded, as
    `SparseAutoencoder` has.
    """

    def __init__(self) -> None:
        self._data: SyntheticDataModule | None = None
        self._sae: Any = None
        self._directions: tuple[Tensor, Tensor] | None = None  # learned and true
        self._classification: FeatureClassification | None = None
        self._absorption: FeatureAbsorption | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start afresh."""
        data: Any = getattr(trainer, "datamodule", None)
        known = isinstance(data, SyntheticDataModule) and not trainer.sanity_checking
        self._data, self._sae = (data if known else None), None
        if self._data is None:
            return
        self._sae = find_sae(pl_module, "match", "W_dec", "scales", of=self)
        if self._sae is None:
            return
        learned, options = self._sae.W_dec.detach(), {"process_group": ranks_of(trainer).group}
        learned = learned.full_tensor() if hasattr(learned, "full_tensor") else learned
        truth = self._data.truth
        true = truth.directions.to(learned.device)
        self._directions = learned, true
        self._classification = FeatureClassification(learned, true, **options).to(learned.device)
        general = truth.parent[truth.parent >= 0].unique()  # the first so many
        self._absorption = None
        if len(general):
            concepts = true[: len(general)]
            self._absorption = FeatureAbsorption(learned, concepts, **options).to(learned.device)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on a batch."""
        if self._sae is None or self._data is None or self._classification is None:
            return
        x = batch["activations"]
        truth = _moved(self._data.true_codes(batch), x.device)
        encoded = outputs.get("encoded") if isinstance(outputs, Mapping) else None
        codes = encoded.codes if isinstance(encoded, Encoded) else self._sae.match(x)
        self._classification.update(codes, truth)
        if self._absorption is not None:
            scales = self._sae.scales(x).expand(len(x), 1)[codes.token, 0]
            count = len(self._absorption.main)
            concepts = truth.select(truth.feature < count)
            concepts = Matches(concepts.token, concepts.feature, concepts.value, (len(x), count))
            self._absorption.update(codes.with_values(codes.value / scales), x, concepts)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(pl_module, "test")

    def _log(self, pl_module: pl.LightningModule, stage: str) -> None:
        if self._sae is None or self._directions is None or self._classification is None:
            return
        figures = direction_statistics(*self._directions) | self._classification.compute()
        if self._absorption is not None:
            figures |= self._absorption.compute()
        for name, value in figures.items():
            pl_module.log(f"{stage}/{name}", value, sync_dist=True)  # equal: it says no more


def _moved(matches: Matches, device: torch.device) -> Matches:
    token, feature, value = (
        each.to(device) for each in (matches.token, matches.feature, matches.value)
    )
    return Matches(token, feature, value, matches.shape)
