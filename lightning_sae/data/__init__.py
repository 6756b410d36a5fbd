"""Text, images or files to activations: the data modules, and what one of one's own is made of."""

from lightning_sae.data.frozen_model import FrozenModel
from lightning_sae.data.frozen_model_datamodule import FrozenModelDataModule
from lightning_sae.data.image_datamodule import ImageActivationDataModule
from lightning_sae.data.known_features import KnownFeatures
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.packer import Packer
from lightning_sae.data.stored_datamodule import StoredActivationsDataModule
from lightning_sae.data.stream import ActivationStream, HeldOutBatch, HeldOutBatches, TrainBatch
from lightning_sae.data.stream_datamodule import StreamDataModule
from lightning_sae.data.synthetic_datamodule import SyntheticDataModule
from lightning_sae.data.text_datamodule import ActivationDataModule
from lightning_sae.data.vision_model import VisionModel

__all__ = [
    "ActivationDataModule",
    "ActivationStream",
    "FrozenModel",
    "FrozenModelDataModule",
    "HeldOutBatch",
    "HeldOutBatches",
    "ImageActivationDataModule",
    "KnownFeatures",
    "LanguageModel",
    "Packer",
    "StoredActivationsDataModule",
    "StreamDataModule",
    "SyntheticDataModule",
    "TrainBatch",
    "VisionModel",
]
