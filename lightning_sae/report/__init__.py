"""What the features of a trained SAE are about."""

from lightning_sae.report.collect import Examples, FiringCollector, Firings, collect

__all__ = ["Examples", "FiringCollector", "Firings", "collect"]
