"""How the values of each feature are distributed, when nobody knows yet how large they get."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["BINS", "ValueHistograms"]

BINS: Final = 32
_DOUBLINGS: Final = int(math.log2(BINS))
"""After so many, all bins there were have become the first."""


class ValueHistograms:
    """Counts the values of each feature in bins of equal width, from 0 to above the largest.

    A width is a power of two. It doubles, and neighbouring bins become one, whenever a value lies
    beyond the last; so the counts depend on the values alone, not on their order, and at least
    half of the bins are in use.

    Args:
        n_features: Size of the dictionary.
        device: Where the counts are.

    Attributes:
        counts: Values in each bin, int64, (n_features, `BINS`).

    Example:
        >>> histograms = ValueHistograms(1)
        >>> histograms.update(torch.tensor([0, 0, 0]), torch.tensor([0.5, 3.0, 31.0]))
        >>> histograms.widths(), histograms.counts[0].nonzero().squeeze(1)
        (tensor([1.]), tensor([ 0,  3, 31]))
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(n_features, BINS, dtype=torch.int64, device=device)
        # Of the power of two that is above all values so far.
        self._exponent = torch.full((n_features,), -126, dtype=torch.int32, device=device)

    def widths(self) -> Tensor:
        """Return how wide the bins of each feature are, float32, (n_features,)."""
        one = torch.ones_like(self._exponent, dtype=torch.float32)
        return torch.ldexp(one, self._exponent - _DOUBLINGS)

    def update(self, feature: Tensor, value: Tensor) -> None:
        """Count values.

        Args:
            feature: The feature of each, int64, (values,).
            value: Above 0, float32, (values,).
        """
        largest = torch.zeros(len(self.counts), device=value.device)
        largest.scatter_reduce_(0, feature, value.float(), "amax")
        exponent = torch.frexp(largest).exponent.where(largest > 0, self._exponent)
        self._widen(exponent.maximum(self._exponent))
        bins = (value.float() / self.widths()[feature]).long()
        places = feature * BINS + bins
        self.counts += torch.bincount(places, minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, exponent: Tensor) -> None:
        doublings = (exponent - self._exponent).clamp(max=_DOUBLINGS)
        self._exponent = exponent
        for done in range(int(doublings.max())):
            rows = (doublings > done).nonzero().squeeze(1)
            halved = self.counts[rows].view(len(rows), BINS // 2, 2).sum(-1)
            self.counts[rows] = torch.nn.functional.pad(halved, (0, BINS // 2))
