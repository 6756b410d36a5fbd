"""Sparse autoencoders on transformer activations, as PyTorch Lightning modules."""

from lightning_sae.allocation import Matches, feature_choice, mutual_choice, token_choice
from lightning_sae.architectures import FeatureChoiceSAE, MutualChoiceSAE, StandardSAE, TopKSAE
from lightning_sae.data import ActivationDataModule, ImageActivationDataModule
from lightning_sae.optim.chunked_adam import ChunkedAdam
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.sae import SparseAutoencoder

__version__ = "0.1.0"

__all__ = [
    "ActivationDataModule",
    "ChunkedAdam",
    "FeatureChoiceSAE",
    "ImageActivationDataModule",
    "Matches",
    "MutualChoiceSAE",
    "ResidualStream",
    "SparseAutoencoder",
    "StandardSAE",
    "TopKSAE",
    "__version__",
    "feature_choice",
    "mutual_choice",
    "token_choice",
]
