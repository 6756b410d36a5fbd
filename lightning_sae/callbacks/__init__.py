"""Lightning callbacks: what to draw, measure, print, write and guard while an SAE trains."""

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
from lightning_sae.callbacks.finite_weights import FiniteWeights
from lightning_sae.callbacks.hparams_tab import HParamsTab
from lightning_sae.callbacks.k_decay import KDecay
from lightning_sae.callbacks.loss_recovered import LossRecoveredCallback
from lightning_sae.callbacks.resampling import ResampleDeadFeatures
from lightning_sae.callbacks.results_table import ResultsTable
from lightning_sae.callbacks.save_pretrained import SavePretrained
from lightning_sae.callbacks.steps_bar import RichStepsBar, TQDMStepsBar
from lightning_sae.callbacks.stop_on_signal import StopOnSignal
from lightning_sae.callbacks.throughput import TokensPerSecond
from lightning_sae.callbacks.top_contexts import TopContexts, top_contexts
from lightning_sae.callbacks.train_sae import TrainSAE
from lightning_sae.callbacks.truth import TruthCallback
from lightning_sae.callbacks.write_matches import WriteMatches

__all__ = [
    "AdaptiveComputationCallback",
    "CalibrateThresholds",
    "FeatureDensityFigures",
    "FiniteWeights",
    "HParamsTab",
    "KDecay",
    "LossRecoveredCallback",
    "ResampleDeadFeatures",
    "ResultsTable",
    "RichStepsBar",
    "SavePretrained",
    "StopOnSignal",
    "TQDMStepsBar",
    "TokensPerSecond",
    "TopContexts",
    "TrainSAE",
    "TruthCallback",
    "WriteMatches",
    "plot_density_histogram",
    "plot_matches_by_loss",
    "plot_matches_per_token",
    "plot_rank_density",
    "top_contexts",
]
