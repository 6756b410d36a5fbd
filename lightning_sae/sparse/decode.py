"""Turn matches back into vectors."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.allocation import Matches

DENSE_ABOVE = 1 / 16  # share of pairs that match: where gathers and a GEMM cost the same on a CPU


def weighted_sum(matches: Matches, dictionary: Tensor) -> Tensor:
    """Add up, for each token, the dictionary rows of its matches, weighted by their values.

    Equal to `matches.to_dense() @ dictionary`, also in its gradients, without the dense codes
    where they are sparse enough for gathering to be the cheaper way.

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
    tokens, features = matches.shape
    values = matches.value.to(dictionary.dtype)
    if len(matches) > DENSE_ABOVE * tokens * features:
        codes = Matches(matches.token, matches.feature, values, matches.shape).to_dense()
        return codes @ dictionary
    starts = torch.searchsorted(matches.token, torch.arange(tokens, device=matches.token.device))
    return functional.embedding_bag(
        matches.feature, dictionary, starts, mode="sum", per_sample_weights=values
    )
