"""What the optimizer of a large dictionary needs, and what the Trainer's hooks do with it."""

from lightning_sae.optim.chunked_adam import ChunkedAdam

__all__ = ["ChunkedAdam"]
