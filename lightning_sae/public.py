"""The names that `lightning_sae` gives, imported from where they are defined."""

from lightning_sae import __version__
from lightning_sae.allocation import (
    Choice,
    Matches,
    Scores,
    feature_choice,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from lightning_sae.architectures import (
    FeatureChoiceSAE,
    FeatureChoiceTranscoder,
    GatedSAE,
    JumpReLUSAE,
    JumpReLUTranscoder,
    MutualChoiceSAE,
    MutualChoiceTranscoder,
    StandardSAE,
    TopKSAE,
    TopKTranscoder,
    load,
)
from lightning_sae.callbacks import FiniteWeights, SavePretrained, StopOnSignal
from lightning_sae.checkpoint_io import AtomicCheckpointIO
from lightning_sae.checks import UsageError
from lightning_sae.data import (
    ActivationDataModule,
    FrozenModelDataModule,
    ImageActivationDataModule,
    LanguageModel,
    StoredActivationsDataModule,
    SyntheticDataModule,
    VisionModel,
)
from lightning_sae.optim import ChunkedAdam
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.several_saes import SeveralSAEs

__all__ = [
    "ActivationDataModule",
    "AtomicCheckpointIO",
    "Choice",
    "ChunkedAdam",
    "FeatureChoiceSAE",
    "FeatureChoiceTranscoder",
    "FiniteWeights",
    "FrozenModelDataModule",
    "GatedSAE",
    "ImageActivationDataModule",
    "JumpReLUSAE",
    "JumpReLUTranscoder",
    "LanguageModel",
    "Matches",
    "MutualChoiceSAE",
    "MutualChoiceTranscoder",
    "ResidualStream",
    "SavePretrained",
    "Scores",
    "SeveralSAEs",
    "SparseAutoencoder",
    "StandardSAE",
    "StopOnSignal",
    "StoredActivationsDataModule",
    "SyntheticDataModule",
    "TopKSAE",
    "TopKTranscoder",
    "UsageError",
    "VisionModel",
    "__version__",
    "feature_choice",
    "load",
    "mutual_choice",
    "threshold_choice",
    "token_choice",
]
