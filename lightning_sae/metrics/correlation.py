"""Whether two numbers that every token has go together."""

from typing import Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import widest_float


class Correlation(TotalsMetric):
    r"""Pearson's correlation over tokens of two numbers, such as matches and loss.

    .. math:: \sum_n (x_n - \bar x)(y_n - \bar y) /
        \sqrt{\sum_n (x_n - \bar x)^2 \sum_n (y_n - \bar y)^2}

    with the means over everything seen. 1 or -1 where one is a linear function of the other. Over N
    tokens, unrelated numbers score within 2 / sqrt(N) of 0 in 19 of 20 cases.

    ``update`` takes x and y, of one shape. ``compute`` returns a float32 scalar; NaN if x or y does
    not vary (but for the rounding of its float64 sums), as matches do not in TopK.

    Attributes:
        moments: Sums over the tokens seen on this rank of all products of two of 1, x and y,
            float64, (3, 3); the first is their number.

    Args:
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Raises:
        ValueError: If x and y differ in shape.

    Example:
        >>> correlation = Correlation()
        >>> correlation.update(torch.tensor([8, 16, 24]), torch.tensor([0.5, 3.0, 2.5]))
        >>> correlation.compute()
        tensor(0.7559)
    """

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_total("moments", 3, 3, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add tokens by their two numbers, both of one shape."""
        if x.shape != y.shape:
            raise UsageError(f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)} differ")
        self.add_to_totals(moments=_correlation_update(x, y))

    def compute(self) -> Tensor:
        """Return the correlation."""
        return _correlation_compute(self.moments)


def _correlation_update(x: Tensor, y: Tensor) -> Tensor:
    wide = widest_float(x.device)
    x, y = (each.detach().flatten().to(wide) for each in (x, y))
    rows = torch.stack([torch.ones_like(x), x, y])  # (3, tokens)
    return rows @ rows.T


def _correlation_compute(moments: Tensor) -> Tensor:
    tokens, sums, squares = moments[0, 0], moments[0, 1:], moments[1:, 1:]
    covariance = squares - sums.outer(sums) / tokens  # (2, 2), times tokens
    variance = covariance.diagonal()
    resolved = 2**12 * torch.finfo(moments.dtype).eps * squares.diagonal()  # less is rounding error
    deviation = variance.where(variance > resolved, torch.nan).sqrt()
    return (covariance[0, 1] / deviation.prod()).clamp(-1, 1).float()
