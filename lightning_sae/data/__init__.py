"""Text to activations: `ActivationDataModule` and the parts it is made of."""

from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.packer import Packer
from lightning_sae.data.stream import ActivationStream, HeldOutBatch, HeldOutBatches, TrainBatch

__all__ = [
    "ActivationDataModule",
    "ActivationStream",
    "HeldOutBatch",
    "HeldOutBatches",
    "Packer",
    "TrainBatch",
]
