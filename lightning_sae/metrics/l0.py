"""How many features fire on a token: the mean and its spread over tokens."""

from typing import Any

import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import ratio, widest_float


class L0(TotalsMetric):
    """Average number of matches per token: features whose code is above 0.

    ``update`` takes dense codes, shape (..., n_features), or their matches, which is faster.
    ``compute`` returns a float32 scalar, NaN before the first token.

    Attributes:
        matches: Number of codes above 0 seen on this rank, int64.
        squared_matches: Sum over tokens of their squared numbers of matches, int64.
        tokens: Number of tokens seen on this rank, int64.

    Args:
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Example:
        >>> l0 = L0()
        >>> l0.update(torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 0.1]]))
        >>> l0.compute()
        tensor(1.5000)
    """

    matches: Tensor
    squared_matches: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_total("matches")
        self.add_total("squared_matches")
        self.add_total("tokens")

    def update(self, codes: Tensor | Matches) -> None:
        """Count the matches of a batch of codes, shape (..., n_features)."""
        matches, squared_matches, tokens = _l0_update(codes)
        self.add_to_totals(matches=matches, squared_matches=squared_matches, tokens=tokens)

    def compute(self) -> Tensor:
        """Return the mean number of matches per token."""
        return ratio(self.matches, self.tokens)


class L0StandardDeviation(L0):
    """Standard deviation over tokens of the number of matches, of the population.

    0 where every token has the same number, as with TopK: it shows how far the allocation adapts to
    the token. Same arguments, inputs and states as `L0`, with which it shares its counting in
    a `MetricCollection`.

    Example:
        >>> l0_std = L0StandardDeviation()
        >>> l0_std.update(torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 0.1]]))
        >>> l0_std.compute()
        tensor(0.5000)
    """

    def compute(self) -> Tensor:
        """Return the standard deviation of the number of matches per token."""
        return _l0_standard_deviation(self.matches, self.squared_matches, self.tokens)


def _l0_update(codes: Tensor | Matches) -> tuple[Tensor, Tensor, int]:
    if isinstance(codes, Matches):
        per_token = codes.per_token()
    else:  # int32: faster than int64 on a CPU
        per_token = (codes > 0).sum(-1, dtype=torch.int32).long()  # (...,)
    return per_token.sum(), per_token.square().sum(), per_token.numel()


def _l0_standard_deviation(matches: Tensor, squared_matches: Tensor, tokens: Tensor) -> Tensor:
    wide = widest_float(tokens.device)
    mean = matches.to(wide) / tokens
    variance = squared_matches.to(wide) / tokens - mean.square()
    return variance.clamp(min=0).sqrt().float()
