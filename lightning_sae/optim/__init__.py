"""What the optimizer of a large dictionary needs."""

from lightning_sae.optim.chunked_adam import ChunkedAdam

__all__ = ["ChunkedAdam"]
