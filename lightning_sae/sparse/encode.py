"""Affinities a tile at a time, to choose from; then the gradient of those that were chosen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sae.kernels import block_maxima, has_kernel, pairs_above, some_pairs_above
from lightning_sae.matches import Matches, Pairs
from lightning_sae.numerics import wide
from lightning_sae.parallel.share import Share
from lightning_sae.selection import Scores, Search
from lightning_sae.sparse.gradient_form import gradient_of
from lightning_sae.sparse.row_sums import RowSums
from lightning_sae.sparse.rows import is_dense, sum_rows


class EncoderScores(Scores):
    """The scores of `x @ weight.T + bias`, each tile computed when it is read.

    Args:
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model).
        bias: Shape (features,).
        scale: What the affinities of each token are multiplied by, shape (tokens,). Default: 1.
        rank: What makes scores of affinities, given some (tokens, features), which tokens and which
            features they are of. Default: affinities are scores.
        share: Which features of all those are that have their rows here. Default: all.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None = None,
        rank: Callable[[Tensor, slice, slice], Tensor] | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__(len(x), share or Share((len(weight),)), x.device)
        self._x, self._weight, self._bias = x.detach(), weight.detach(), bias.detach()
        self._scale, self._rank = scale, rank
        # Processes must all go the same way, and a search may decide for tiles.
        if rank is None and self.share.mesh is None and has_kernel(self._x):
            self.search = KernelSearch(self._x, self._weight, self._bias, scale)

    def feature_rows(self, features: slice, out: Tensor | None = None) -> Tensor:
        """Return the scores of some features, shape (features, tokens)."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            affinities = torch.mm(self._weight[features], self._x.T, out=out)
            affinities += self._bias[features].unsqueeze(1)
            if self._scale is not None:
                affinities *= self._scale
            if self._rank is None:
                return affinities
            everyone = slice(0, len(self._x))
            return self._rank(affinities.T, everyone, features).T.contiguous()

    def token_rows(self, tokens: slice, features: slice, out: Tensor | None = None) -> Tensor:
        """Return the scores of some pairs, shape (tokens, features)."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            affinities = torch.mm(self._x[tokens], self._weight[features].T, out=out)
            affinities += self._bias[features]
            if self._scale is not None:
                affinities *= self._scale[tokens].unsqueeze(1)
            if self._rank is None:
                return affinities
            return self._rank(affinities, tokens, features).contiguous()


class KernelSearch(Search):
    """A search by kernels; only where `has_kernel`. Arguments are those of `EncoderScores`."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> None:
        super().__init__((len(x), len(weight)), x.device)
        self._x, self._weight, self._bias, self._scale = x, weight, bias, scale

    def pairs_above(self, thresholds: Tensor, most: int | None = None) -> Pairs | None:
        """Return all pairs that score above a threshold."""
        return pairs_above(self._x, self._weight, self._bias, self._scale, thresholds, most)

    def some_pairs_above(self, thresholds: Tensor, capacity: int) -> tuple[Tensor, Pairs]:
        """Return how many pairs score above a threshold, and those that fit."""
        each = self._x, self._weight, self._bias, self._scale
        return some_pairs_above(*each, thresholds, capacity)

    def block_maxima(
        self, rows: slice, thresholds: Tensor | None = None, *, rows_are_tokens: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the maxima of blocks of some rows, and how many tokens are above thresholds."""
        x, weight, bias, scale = self._x, self._weight, self._bias, self._scale
        if rows_are_tokens:
            x, scale = x[rows], None if scale is None else scale[rows]
        else:
            weight, bias = weight[rows], bias[rows]
            thresholds = None if thresholds is None else thresholds[rows].clamp_min(0).float()
        return block_maxima(x, weight, bias, scale, thresholds, rows_are_tokens=rows_are_tokens)


def matched_affinities(
    x: Tensor,
    origin: Tensor,
    weight: Tensor,
    bias: Tensor,
    matches: Matches,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Return the affinities of matches, known already, with the gradient of the encoder.

    Equal to `((x - origin) @ weight.T + bias)[matches.token, matches.feature]` in value and
    gradients, at a cost that grows with the matches: whoever chose the matches computed all
    affinities, but without autograd.

    Args:
        x: Inputs, shape (tokens, d_model).
        origin: Shape (d_model,).
        weight: One row a feature, shape (features, d_model). It may have 16 bits where the others
            are wider.
        bias: Shape (features,).
        matches: Pairs and their affinities, sorted by token.
        in_parts: Whether the gradient of the weight may be a `RowGradient`.

    Returns:
        Shape (matches,), equal to `matches.value`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> match = Matches(torch.tensor([0]), torch.tensor([1]), torch.tensor([6.0]), shape=(1, 2))
        >>> zeros = torch.zeros(2)
        >>> matched_affinities(torch.tensor([[5.0, 3.0]]), zeros, weight, zeros, match).backward()
        >>> weight.grad
        tensor([[0., 0.],
                [5., 3.]])
    """
    return _MatchedAffinities.apply(x, origin, weight, bias, matches, in_parts)  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


class _MatchedAffinities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Tensor,
        weight: Tensor,
        bias: Tensor,
        matches: Matches,
        in_parts: bool,
    ) -> Tensor:
        ctx.matches, ctx.in_parts = matches, in_parts
        ctx.save_for_backward(x, origin, weight)
        return matches.value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, origin, weight = ctx.saved_tensors
        matches: Matches = ctx.matches
        grad = grad.contiguous()  # a sum's gradient is expanded
        weight = wide(weight)  # here, and not kept: terms of a loss share the 16 bits
        tokens, features = matches.shape
        to_bias = grad.new_zeros(features).index_add_(0, matches.feature, grad)
        # Each match's gradient flows to the origin along its feature's row: add up per feature.
        to_origin = -(to_bias @ weight)
        to_x = None
        if is_dense(matches):
            dense = matches.to_dense(grad)
            if ctx.needs_input_grad[0]:
                to_x = dense @ weight
            return to_x, to_origin, dense.T @ (x - origin), to_bias, None, None
        if ctx.needs_input_grad[0]:
            to_x = sum_rows(weight, matches.token, matches.feature, grad, tokens)
        to_weight = None
        if ctx.needs_input_grad[2]:
            sums = RowSums.of(x - origin, grad, matches)
            to_weight = gradient_of(sums, in_parts=ctx.in_parts)
        return to_x, to_origin, to_weight, to_bias, None, None
