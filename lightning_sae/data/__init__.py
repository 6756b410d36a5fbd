"""Text or images to activations: the data modules and the parts they are made of."""

from lightning_sae.data.base import FrozenModelDataModule
from lightning_sae.data.datamodule import ActivationDataModule
from lightning_sae.data.image_datamodule import ImageActivationDataModule
from lightning_sae.data.packer import Packer
from lightning_sae.data.stream import ActivationStream, HeldOutBatch, HeldOutBatches, TrainBatch

__all__ = [
    "ActivationDataModule",
    "ActivationStream",
    "FrozenModelDataModule",
    "HeldOutBatch",
    "HeldOutBatches",
    "ImageActivationDataModule",
    "Packer",
    "TrainBatch",
]
