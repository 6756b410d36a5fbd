"""Processes that train together: what each has of the tokens and of the features."""

from lightning_sae.parallel.layout import Layout
from lightning_sae.parallel.ranks import Ranks, ranks_of
from lightning_sae.parallel.share import Share, distribute, local, wide_rows

__all__ = ["Layout", "Ranks", "Share", "distribute", "local", "ranks_of", "wide_rows"]
