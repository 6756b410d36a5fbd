"""How often each feature fires."""

from typing import Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import ratio


class FeatureDensity(TotalsMetric):
    """Share of tokens on which each feature fires, its code being above 0.

    ``update`` takes dense codes, shape (..., n_features), or their matches, which is faster.
    ``compute`` returns float32 shares, shape (n_features,), NaN before the first token.

    Attributes:
        fires: Number of tokens on which each feature fired on this rank, int64, (n_features,).
        tokens: Number of tokens seen on this rank, int64.

    Args:
        n_features: Number of features of the dictionary.
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Raises:
        ValueError: If n_features is not positive, or differs from the codes' last dimension.

    Example:
        >>> density = FeatureDensity(3)
        >>> density.update(torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 0.1]]))
        >>> density.compute()
        tensor([0.5000, 0.0000, 1.0000])
    """

    fires: Tensor
    tokens: Tensor

    def __init__(self, n_features: int, **kwargs: Any) -> None:
        if n_features < 1:
            raise UsageError(f"n_features={n_features}: a dictionary has at least one feature")
        super().__init__(**kwargs)
        self.n_features = n_features
        self.add_total("fires", n_features)
        self.add_total("tokens")

    def update(self, codes: Tensor | Matches) -> None:
        """Count where features fire in a batch of codes, shape (..., n_features)."""
        if tuple(codes.shape[-1:]) != (self.n_features,):
            raise UsageError(
                f"codes of shape {tuple(codes.shape)}: the last dimension must be "
                f"n_features={self.n_features}"
            )
        fires, tokens = _density_update(codes)
        self.add_to_totals(fires=fires, tokens=tokens)

    def compute(self) -> Tensor:
        """Return the density of each feature, shape (n_features,)."""
        return ratio(self.fires, self.tokens)


def _density_update(codes: Tensor | Matches) -> tuple[Tensor, int]:
    if isinstance(codes, Matches):
        return codes.per_feature(), codes.shape[0]
    fired = codes.reshape(-1, codes.shape[-1]) > 0  # (tokens, features)
    return fired.sum(0, dtype=torch.int32), fired.shape[0]  # int32: faster than int64 on a CPU
