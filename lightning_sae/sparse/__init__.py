"""Arithmetic on matches whose cost grows with the matches, not with tokens x features."""

from lightning_sae.sparse.decode import weighted_sum

__all__ = ["weighted_sum"]
