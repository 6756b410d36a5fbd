"""What the features of a trained SAE are about."""

from lightning_sae.report.collect import Examples, FiringCollector, Firings, collect
from lightning_sae.report.logit_lens import LogitLens, logit_lens
from lightning_sae.report.nearest import nearest_features

__all__ = [
    "Examples",
    "FiringCollector",
    "Firings",
    "LogitLens",
    "collect",
    "logit_lens",
    "nearest_features",
]
