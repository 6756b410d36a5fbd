"""How much of the activations' variance the reconstruction misses."""

from typing import Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import ratio, widest_float


class FractionOfVarianceUnexplained(TotalsMetric):
    r"""Squared error of the reconstruction over the variance of the activations.

    .. math:: \sum_n \|x_n - \hat x_n\|^2 / \sum_n \|x_n - \bar x\|^2

    with the mean over everything seen, not over a batch: 0 is a perfect reconstruction, and 1 what
    predicting the mean activation scores. It is not an average of batches' values, which is biased.

    Sums are kept in float64, where a mean a thousand times the standard deviation costs six of
    sixteen digits. Activations that are constant up to the rounding of these sums have no variance
    to explain, and the value is NaN, as it is before the first token.

    ``update`` takes the reconstruction and the activations, each (..., d_model), in that order.
    ``compute`` returns a float32 scalar.

    Args:
        d_model: Length of an activation.
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Raises:
        ValueError: If d_model is not positive, or the inputs do not both have shape (..., d_model).

    Example:
        >>> fvu = FractionOfVarianceUnexplained(2)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> fvu.update(x + torch.tensor([1.0, 0.0]), x)
        >>> fvu.compute()
        tensor(0.2000)
    """

    higher_is_better = False
    squared_error: Tensor
    squared_length: Tensor
    activation: Tensor
    tokens: Tensor

    def __init__(self, d_model: int, **kwargs: Any) -> None:
        if d_model < 1:
            raise UsageError(f"d_model={d_model}: an activation has at least one dimension")
        super().__init__(**kwargs)
        self.d_model = d_model
        self.add_total("squared_error", dtype=torch.float64)
        self.add_total("squared_length", dtype=torch.float64)
        self.add_total("activation", d_model, dtype=torch.float64)
        self.add_total("tokens")

    def update(self, reconstruction: Tensor, activations: Tensor) -> None:
        """Add a batch of reconstructions and of the activations they are of, (..., d_model)."""
        if reconstruction.shape != activations.shape or activations.shape[-1:] != (self.d_model,):
            raise UsageError(
                f"reconstruction of shape {tuple(reconstruction.shape)} and activations of shape "
                f"{tuple(activations.shape)}: both must be (..., d_model={self.d_model})"
            )
        squared_error, squared_length, activation, tokens = _fvu_update(reconstruction, activations)
        self.add_to_totals(
            squared_error=squared_error,
            squared_length=squared_length,
            activation=activation,
            tokens=tokens,
        )

    def compute(self) -> Tensor:
        """Return the fraction of variance unexplained."""
        return _fvu_compute(self.squared_error, self.squared_length, self.activation, self.tokens)


def _fvu_update(reconstruction: Tensor, activations: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    rows = activations.detach().reshape(-1, activations.shape[-1])  # (tokens, d_model)
    wide = rows.to(widest_float(rows.device))
    error = reconstruction.detach().reshape(wide.shape) - wide
    return error.square().sum(), wide.square().sum(), wide.sum(0), wide.shape[0]


def _fvu_compute(
    squared_error: Tensor, squared_length: Tensor, activation: Tensor, tokens: Tensor
) -> Tensor:
    variance = squared_length - activation.square().sum() / tokens
    resolved = 2**12 * torch.finfo(variance.dtype).eps * squared_length  # less is rounding error
    return ratio(squared_error, variance.where(variance > resolved, torch.nan))
