"""Triton twins of the functions of `lightning_sae.sparse`, for tensors on a GPU.

Imported at the first call that a GPU serves, never with the package: Triton is optional. Tested in
Triton's interpreter and compiled for Hopper and Blackwell GPUs, but not yet run on any: tile sizes
are estimates.
"""

from lightning_sae.sparse.kernels.dots import dot_rows
from lightning_sae.sparse.kernels.pairs import pairs_above
from lightning_sae.sparse.kernels.sums import sum_rows, sum_segments

__all__ = ["dot_rows", "pairs_above", "sum_rows", "sum_segments"]
