"""Lightning callbacks: what to draw, measure, print and write while an SAE trains or is used."""

from lightning_sae.callbacks.adaptive_computation import (
    AdaptiveComputationCallback,
    plot_matches_by_loss,
    plot_matches_per_token,
)
from lightning_sae.callbacks.calibrate_thresholds import CalibrateThresholds
from lightning_sae.callbacks.figures import (
    FeatureDensityFigures,
    plot_density_histogram,
    plot_rank_density,
)
from lightning_sae.callbacks.loss_recovered import LossRecoveredCallback
from lightning_sae.callbacks.resampling import ResampleDeadFeatures
from lightning_sae.callbacks.results_table import ResultsTable
from lightning_sae.callbacks.throughput import TokensPerSecond
from lightning_sae.callbacks.write_matches import WriteMatches

__all__ = [
    "AdaptiveComputationCallback",
    "CalibrateThresholds",
    "FeatureDensityFigures",
    "LossRecoveredCallback",
    "ResampleDeadFeatures",
    "ResultsTable",
    "TokensPerSecond",
    "WriteMatches",
    "plot_density_histogram",
    "plot_matches_by_loss",
    "plot_matches_per_token",
    "plot_rank_density",
]
