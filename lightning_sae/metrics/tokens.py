"""How many tokens were measured."""

from typing import Any

from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.metrics.base import TotalsMetric

__all__ = ["TokenCount"]


class TokenCount(TotalsMetric):
    """Number of tokens seen, over all ranks.

    ``update`` takes dense codes, shape (..., n_features), or their matches. ``compute`` returns an
    int64 scalar.

    Args:
        kwargs: Those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> tokens = TokenCount()
        >>> tokens.update(torch.zeros(2, 3, 8))
        >>> tokens.compute()
        tensor(6)
    """

    counted: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_total("counted")

    def update(self, codes: Tensor | Matches) -> None:
        """Count the tokens of a batch of codes, shape (..., n_features)."""
        tokens = codes.shape[0] if isinstance(codes, Matches) else codes[..., 0].numel()
        self.add_to_totals(counted=tokens)

    def compute(self) -> Tensor:
        """Return how many there were."""
        return self.counted
