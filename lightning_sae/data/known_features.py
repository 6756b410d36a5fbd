"""Features that are known: which fire, how strongly, and in which directions they point."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.checks import (
    UsageError,
    require_not_negative,
    require_positive,
    require_share,
)
from lightning_sae.matches import Matches

__all__ = ["KnownFeatures"]


class KnownFeatures:
    r"""Sparse features, of which activations are made.

    As in SAELens' `sae_lens.synthetic`: feature i fires on a share of tokens and then has a value
    around 1, and an activation is the sum of the directions of those that fire, by their values:

    .. math:: x_n = \sum_i z_{ni} d_i, \quad P(z_{ni} > 0) = p_i \propto (i + q)^{-s},
        \quad \sum_i p_i = L_0

    with i from 1. Directions are random unit vectors. Features may depend on each other, in two
    ways, of which each by itself leaves these shares as they are:

    * They are correlated, by a Gaussian copula: a feature fires where a normal variable of its own
      exceeds what it does on a share p_i of tokens, and these have `correlation` of their variance
      in common, as products with a random unit vector a feature, of `rank` numbers a token.
    * Children fire only where their parent does, then on a share p_child / p_parent of tokens. The
      densest features are parents of an equal number of children each; those are dealt out.

    Args:
        d_model: Width of the activations.
        features: How many there are.
        l0: How many fire on a token, on average.
        zipf_exponent: s.
        zipf_offset: q.
        correlation: Share of variance in common, 0 to less than 1.
        children: Of each parent; 0: none has any.
        seed: Of directions, of what is correlated, and of draws.

    Attributes:
        spread: Standard deviation of values, around 1.
        directions: d, float32, (features, d_model).
        density: p, float64, (features,), descending.
        parent: The parent of each, int64, (features,); -1: it has none.

    Raises:
        UsageError: If an argument is out of its range, or a feature would have to fire on more
            tokens than there are.

    Example:
        >>> truth = KnownFeatures(d_model=8, features=20, l0=2.0)
        >>> codes = truth.draw(1000, key=(0,))
        >>> codes.shape, truth.activations(codes).shape
        ((1000, 20), torch.Size([1000, 8]))
    """

    spread = 0.25
    rank = 16

    def __init__(
        self,
        d_model: int,
        features: int,
        l0: float,
        *,
        zipf_exponent: float = 1.0,
        zipf_offset: float = 10.0,
        correlation: float = 0.0,
        children: int = 0,
        seed: int = 0,
    ) -> None:
        require_positive(d_model=d_model, true_features=features)
        require_not_negative(true_l0=l0, zipf_exponent=zipf_exponent, zipf_offset=zipf_offset)
        require_not_negative(children=children)
        require_share(correlation=correlation)
        self.seed = seed
        self.density = _densities(features, l0, zipf_exponent, zipf_offset)
        parents = features // (1 + children) if children else 0
        self._parents, self._related = parents, parents * (1 + children)
        number = torch.arange(features)
        is_child = (number >= parents) & (number < self._related)
        self.parent = torch.where(is_child, number % max(parents, 1), -1)
        draw = np.random.default_rng((seed, 3))
        directions = draw.standard_normal((features, d_model), dtype=np.float32)
        self.directions = functional.normalize(torch.from_numpy(directions), dim=1)
        common = draw.standard_normal((features, self.rank))
        common *= math.sqrt(correlation) / np.linalg.norm(common, axis=1, keepdims=True)
        self._common = common.astype(np.float32) if correlation else None
        self._own = np.float32(math.sqrt(1 - correlation))
        of_parent = self.density[self.parent].where(self.parent >= 0, 1.0)
        self._bound = torch.special.ndtri(1 - self.density / of_parent).float().numpy()

    def draw(self, tokens: int, key: tuple[int, ...]) -> Matches:
        """Return the codes of some tokens, (tokens, features): a function of the seed and the key.

        Args:
            tokens: How many.
            key: Numbers from 0 on, which tell them from all others.
        """
        draw = np.random.default_rng((self.seed, *key))
        normal = draw.standard_normal((tokens, len(self.density)), dtype=np.float32)
        if self._common is not None:
            shared = draw.standard_normal((tokens, self.rank), dtype=np.float32)
            normal = self._own * normal + shared @ self._common.T
        fires = normal > self._bound
        for first in range(self._parents, self._related, max(1, self._parents)):
            fires[:, first : first + self._parents] &= fires[:, : self._parents]
        token, feature = fires.nonzero()
        value = np.abs(1 + self.spread * draw.standard_normal(len(token), dtype=np.float32))
        token, feature = np.ascontiguousarray(token), np.ascontiguousarray(feature)
        columns = torch.from_numpy(token), torch.from_numpy(feature), torch.from_numpy(value)
        return Matches(*columns, (tokens, len(self.density)))

    def activations(self, codes: Matches) -> Tensor:
        """Return the sums of directions that codes stand for, (tokens, d_model), float32."""
        starts = torch.searchsorted(codes.token, torch.arange(codes.shape[0]))
        return functional.embedding_bag(
            codes.feature, self.directions, starts, mode="sum", per_sample_weights=codes.value
        )


def _densities(features: int, l0: float, exponent: float, offset: float) -> Tensor:
    law = (torch.arange(1, features + 1, dtype=torch.float64) + offset) ** -exponent
    density = l0 * law / law.sum()
    if not 0 < float(density[0]) < 1:
        raise UsageError(
            f"true_l0={l0}: the densest of true_features={features} would fire on a share "
            f"{float(density[0]):.3g} of tokens by zipf_exponent={exponent} and "
            f"zipf_offset={offset}; it must be more than 0 and less than 1"
        )
    return density
