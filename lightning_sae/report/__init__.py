"""What the features of a trained SAE are about: one pass over text, as a page and as tables."""

from lightning_sae.report.collect import Examples, FiringCollector, Firings, collect
from lightning_sae.report.contents import FeatureReport
from lightning_sae.report.logit_lens import LogitLens, logit_lens
from lightning_sae.report.nearest import nearest_features
from lightning_sae.report.neuronpedia import write_neuronpedia
from lightning_sae.report.page import page
from lightning_sae.report.table import write_tables
from lightning_sae.report.write import report_of, write_report

__all__ = [
    "Examples",
    "FeatureReport",
    "FiringCollector",
    "Firings",
    "LogitLens",
    "collect",
    "logit_lens",
    "nearest_features",
    "page",
    "report_of",
    "write_neuronpedia",
    "write_report",
    "write_tables",
]
