"""Lightning callbacks: what to draw, measure, print and write while an SAE trains or is used."""

from lightning_sae.callbacks.figures import (
    FeatureDensityFigures,
    plot_density_histogram,
    plot_rank_density,
)
from lightning_sae.callbacks.loss_recovered import LossRecoveredCallback
from lightning_sae.callbacks.results_table import ResultsTable
from lightning_sae.callbacks.throughput import TokensPerSecond
from lightning_sae.callbacks.write_matches import WriteMatches

__all__ = [
    "FeatureDensityFigures",
    "LossRecoveredCallback",
    "ResultsTable",
    "TokensPerSecond",
    "WriteMatches",
    "plot_density_histogram",
    "plot_rank_density",
]
