"""Metrics of sparse autoencoders for torchmetrics: usable with Lightning, in a loop, or alone."""

from lightning_sae.metrics.absorption import FeatureAbsorption
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.metrics.classification import FeatureClassification
from lightning_sae.metrics.correlation import Correlation
from lightning_sae.metrics.dead import DeadFeatures
from lightning_sae.metrics.density import FeatureDensity
from lightning_sae.metrics.directions import direction_statistics, largest_cosines
from lightning_sae.metrics.fraction_of_variance_unexplained import FractionOfVarianceUnexplained
from lightning_sae.metrics.l0 import L0, L0StandardDeviation
from lightning_sae.metrics.loss_recovered import LossRecovered, loss_recovered
from lightning_sae.metrics.next_token_losses import next_token_losses
from lightning_sae.metrics.prefix_fvu import PrefixFVU
from lightning_sae.metrics.tokens import TokenCount
from lightning_sae.metrics.zipf import ZipfStatistics, zipf_statistics

__all__ = [
    "L0",
    "Correlation",
    "DeadFeatures",
    "FeatureAbsorption",
    "FeatureClassification",
    "FeatureDensity",
    "FractionOfVarianceUnexplained",
    "L0StandardDeviation",
    "LossRecovered",
    "PrefixFVU",
    "TokenCount",
    "TotalsMetric",
    "ZipfStatistics",
    "direction_statistics",
    "largest_cosines",
    "loss_recovered",
    "next_token_losses",
    "zipf_statistics",
]
