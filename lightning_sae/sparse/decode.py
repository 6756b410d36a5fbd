"""Turn matches back into vectors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_sae.matches import Matches
from lightning_sae.numerics import wide
from lightning_sae.sparse.gradient_form import gradient_of
from lightning_sae.sparse.row_sums import RowSums
from lightning_sae.sparse.rows import is_dense, sum_rows, widened_again


def sum_directions(matches: Matches, dictionary: Tensor, *, in_parts: bool = False) -> Tensor:
    """Add up, for each token, the directions of its matches, weighted by their values.

    Equal to `matches.to_dense() @ normalize(dictionary)`, also in its gradients, without any tensor
    of tokens x features, or another dictionary, where matches are sparse enough for gathering to be
    the cheaper way. The gradient of a row is orthogonal to it: along itself a row cannot change its
    direction.

    Args:
        matches: The matches, sorted by token.
        dictionary: One row a feature, of any norm and floating-point type, (features, d_model).
        in_parts: Whether the gradient of the dictionary may be a `RowGradient`.

    Returns:
        Shape (tokens, d_model), in float32, or in float64 if the dictionary is.

    Example:
        >>> matches = Matches(torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]),
        ...                   shape=(1, 3))
        >>> sum_directions(matches, torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 4.0]]))
        tensor([[1., 2.]])
    """
    rows = wide(dictionary)
    values = matches.value.to(rows.dtype)
    if is_dense(matches):
        return matches.to_dense(values) @ functional.normalize(rows, dim=1)
    # The least norm is that of `normalize`.
    norms = torch.linalg.vector_norm(rows.detach(), dim=1).clamp_min(1e-12)
    weights = values / norms[matches.feature]
    with widened_again(dictionary, rows):
        out = sum_rows(rows, matches.token, matches.feature, weights, matches.shape[0])
    return _WithDictionaryGradient.apply(out, dictionary, matches, weights.detach(), in_parts)  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


class _WithDictionaryGradient(torch.autograd.Function):
    """The identity on a sum of directions, that gives the dictionary its gradient.

    Autograd's own form adds to the rows one match at a time: many times slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        dictionary: Tensor,
        matches: Matches,
        weights: Tensor,
        in_parts: bool,
    ) -> Tensor:
        ctx.matches, ctx.in_parts = matches, in_parts
        ctx.save_for_backward(dictionary, weights)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dictionary, weights = ctx.saved_tensors
        to_dictionary = None
        if ctx.needs_input_grad[1]:
            rows = dictionary.detach()  # a gradient must not hold the graph that holds it
            sums = RowSums.of(grad, weights, ctx.matches, along=rows)
            to_dictionary = gradient_of(sums, in_parts=ctx.in_parts)
        return grad, to_dictionary, None, None, None
