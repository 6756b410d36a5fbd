"""Arithmetic on matches whose cost grows with the matches, not with tokens x features."""

from lightning_sae.sparse.decode import weighted_sum
from lightning_sae.sparse.encode import matched_affinities

__all__ = ["matched_affinities", "weighted_sum"]
