"""Which features point the same way."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["nearest_features"]

ROWS: Final = 1024
"""Features whose cosines with all others are in memory at once."""


@torch.no_grad()
def nearest_features(directions: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """Return the features whose directions have the largest cosines with each one's.

    Args:
        directions: Decoder rows, (n_features, d_model), of any length.
        n: How many; fewer if there are no more features.

    Returns:
        The features, int64, and their cosines, float32, both (n_features, n), the nearest first.

    Example:
        >>> nearest_features(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), n=1)[0]
        tensor([[2],
                [2],
                [0]])
    """
    unit = functional.normalize(directions.float(), dim=1)
    n = min(n, len(unit) - 1)
    found = []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)  # of each with itself
        found.append(cosines.topk(n, dim=1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])
