"""Turn matches back into vectors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sae.allocation import Matches
from lightning_sae.sparse.rows import is_dense, sum_rows


def weighted_sum(matches: Matches, dictionary: Tensor) -> Tensor:
    """Add up, for each token, the dictionary rows of its matches, weighted by their values.

    Equal to `matches.to_dense() @ dictionary`, also in its gradients, without any tensor of tokens
    x features where matches are sparse enough for gathering to be the cheaper way.

    Args:
        matches: The matches, sorted by token.
        dictionary: One row a feature, shape (features, d_model).

    Returns:
        Shape (tokens, d_model), the dtype of `dictionary`.

    Example:
        >>> matches = Matches(torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]),
        ...                   shape=(1, 3))
        >>> weighted_sum(matches, torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]))
        tensor([[1., 2.]])
    """
    values = matches.value.to(dictionary.dtype)
    if is_dense(matches):
        return matches.to_dense(values) @ dictionary
    out = sum_rows(dictionary, matches.token, matches.feature, values, matches.shape[0])
    return _WithDictionaryGradient.apply(out, dictionary, matches, values.detach())  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


class _WithDictionaryGradient(torch.autograd.Function):
    """The identity on a weighted sum, that gives the dictionary its gradient.

    Autograd's own form adds to the rows one match at a time: many times slower.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, dictionary: Tensor, matches: Matches, values: Tensor
    ) -> Tensor:
        ctx.matches = matches
        ctx.save_for_backward(values)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, feature, order = ctx.matches.by_feature
        values = ctx.saved_tensors[0][order]
        rows = sum_rows(grad, feature, token, values, ctx.matches.shape[1])
        return grad, rows, None, None
