"""GPU kernels, and which calls they serve: torch's own code serves all others."""

from lightning_sae.kernels.dispatch import (
    block_maxima,
    has_kernel,
    pairs_above,
    some_pairs_above,
    with_kernel,
)

__all__ = ["block_maxima", "has_kernel", "pairs_above", "some_pairs_above", "with_kernel"]
