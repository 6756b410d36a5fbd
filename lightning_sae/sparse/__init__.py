"""Arithmetic on matches whose cost grows with the matches, not with tokens x features."""

from lightning_sae.sparse.decode import sum_directions
from lightning_sae.sparse.encode import EncoderScores, matched_affinities
from lightning_sae.sparse.row_gradient import (
    GradientCollector,
    RowGradient,
    give_whole,
    gradient_parts,
    keep_in_parts,
    rows_at_a_time,
)
from lightning_sae.sparse.rows import dot_rows, is_dense

__all__ = [
    "EncoderScores",
    "GradientCollector",
    "RowGradient",
    "dot_rows",
    "give_whole",
    "gradient_parts",
    "is_dense",
    "keep_in_parts",
    "matched_affinities",
    "rows_at_a_time",
    "sum_directions",
]
