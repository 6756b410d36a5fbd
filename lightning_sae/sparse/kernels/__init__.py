"""Triton twins of the functions of `lightning_sae.sparse`, for tensors on a GPU.

Imported at the first call that a GPU serves, never with the package: Triton is optional. Tested in
Triton's interpreter, compiled for Hopper and Blackwell GPUs, and run on an H100, for which tiles
have their sizes.
"""

from lightning_sae.sparse.kernels.dots import dot_rows
from lightning_sae.sparse.kernels.maxima import block_maxima
from lightning_sae.sparse.kernels.pairs import pairs_above
from lightning_sae.sparse.kernels.sums import sum_rows, sum_segments

__all__ = ["block_maxima", "dot_rows", "pairs_above", "sum_rows", "sum_segments"]
