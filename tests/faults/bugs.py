"""Classes of a user's with a mistake in their code, not in the settings."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lightning_sae import TopKSAE


class InConstructor(TopKSAE):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forgotten.append(1)


class InStep(TopKSAE):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.forgotten * super().training_step(batch, batch_idx)


class InTorch(TopKSAE):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.optim.SGD([])  # a ValueError
        return super().training_step(batch, batch_idx)


class InLightning(TopKSAE):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train/what", "is no number")  # a ValueError
        return super().training_step(batch, batch_idx)


class InCallback(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        int("a ValueError")


class InCallbackConstructor(pl.Callback):
    def __init__(self) -> None:
        raise KeyError("forgotten")


class InStrategyConstructor(SingleDeviceStrategy):
    """Beside a class, a strategy may be a name: jsonargparse tries that first."""

    def __init__(self) -> None:
        raise ZeroDivisionError("of a strategy")
