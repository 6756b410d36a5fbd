"""One architecture a file, each a rule for spending a budget of token-feature matches."""

from lightning_sae.architectures.feature_choice import FeatureChoiceSAE
from lightning_sae.architectures.gated import GatedSAE
from lightning_sae.architectures.jumprelu import JumpReLUSAE
from lightning_sae.architectures.loaded import load
from lightning_sae.architectures.mutual_choice import MutualChoiceSAE
from lightning_sae.architectures.standard import StandardSAE
from lightning_sae.architectures.topk import TopKSAE
from lightning_sae.architectures.transcoder import (
    FeatureChoiceTranscoder,
    JumpReLUTranscoder,
    MutualChoiceTranscoder,
    TopKTranscoder,
    Transcoder,
)

__all__ = [
    "FeatureChoiceSAE",
    "FeatureChoiceTranscoder",
    "GatedSAE",
    "JumpReLUSAE",
    "JumpReLUTranscoder",
    "MutualChoiceSAE",
    "MutualChoiceTranscoder",
    "StandardSAE",
    "TopKSAE",
    "TopKTranscoder",
    "Transcoder",
    "load",
]
