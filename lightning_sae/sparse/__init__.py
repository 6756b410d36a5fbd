"""Arithmetic on matches whose cost grows with the matches, not with tokens x features."""

from lightning_sae.sparse.decode import sum_directions
from lightning_sae.sparse.encode import EncoderScores, matched_affinities
from lightning_sae.sparse.gradient_form import GradientForm
from lightning_sae.sparse.row_gradient import RowGradient
from lightning_sae.sparse.rows import dot_rows

__all__ = [
    "EncoderScores",
    "GradientForm",
    "RowGradient",
    "dot_rows",
    "matched_affinities",
    "sum_directions",
]
