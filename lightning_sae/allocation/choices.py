"""Three rules that spend a budget of token-feature matches.

All take affinities (tokens, features) and return the matches of largest total affinity that the
rule's budget allows (Ayonrinde 2024, arXiv 2411.02124, calls the assumption behind it, that a
larger affinity matters more, the Monotonic Importance Heuristic):

* token choice: every token takes at most k features (TopK);
* mutual choice: the batch takes at most M pairs, anywhere (the allocation of BatchTopK);
* feature choice: feature i takes at most m_i tokens (expert choice, seen from the features).

A pair without a positive affinity is never a match, so a budget may remain partly unspent. Among
equal affinities the lower token index wins, then the lower feature index. The choice itself is
made in float32 or wider and carries no gradient; gradients flow through the matches' values.
"""

import torch
from torch import Tensor

from lightning_sae.allocation.matches import Matches, matches_where
from lightning_sae.allocation.ranking import largest_positive


def token_choice(affinities: Tensor, k: int) -> Matches:
    """Let every token choose its k features of largest affinity.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        k: Matches a token may take, 1 to features.

    Raises:
        ValueError: If k is out of range or the affinities are not two-dimensional.

    Example:
        >>> token_choice(torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, -2.0]]), k=2).to_dense()
        tensor([[3.0000, 0.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    tokens, features = _shape(affinities)
    if not 1 <= k <= features:
        raise ValueError(f"k={k} is out of range: a token has 1 to {features} features to choose")
    scores = _scores(affinities)
    chosen = largest_positive(scores, torch.full((tokens,), k, device=scores.device))
    return matches_where(affinities, chosen)


def mutual_choice(affinities: Tensor, budget: int) -> Matches:
    """Choose the `budget` pairs of largest affinity in the whole batch.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: Matches the batch may take, 0 to tokens * features; k * tokens for an expected k
            matches a token.

    Raises:
        ValueError: If the budget is out of range or the affinities are not two-dimensional.

    Example:
        >>> mutual_choice(torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]]), budget=3).to_dense()
        tensor([[3., 1., 2.],
                [0., 0., 0.]])
    """
    tokens, features = _shape(affinities)
    if not 0 <= budget <= tokens * features:
        raise ValueError(
            f"budget={budget} is out of range: the batch has {tokens * features} pairs"
        )
    scores = _scores(affinities)
    chosen = largest_positive(scores.reshape(1, -1), torch.tensor([budget], device=scores.device))
    return matches_where(affinities, chosen.view(tokens, features))


def feature_choice(affinities: Tensor, budgets: Tensor) -> Matches:
    """Let every feature choose its tokens of largest affinity.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budgets: Matches each feature may take, integers from 0 to tokens, shape (features,).

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.

    Example:
        >>> affinities = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]])
        >>> feature_choice(affinities, torch.tensor([1, 2, 1])).to_dense()
        tensor([[3.0000, 1.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    tokens, features = _shape(affinities)
    if budgets.shape != (features,) or budgets.is_floating_point():
        raise ValueError(
            f"budgets must be {features} integers, one a feature, "
            f"not {budgets.dtype} of shape {tuple(budgets.shape)}"
        )
    if features and not 0 <= int(budgets.min()) <= int(budgets.max()) <= tokens:
        raise ValueError(
            f"budgets from {int(budgets.min())} to {int(budgets.max())} are out of range: "
            f"the batch has {tokens} tokens"
        )
    chosen = largest_positive(_scores(affinities).T.contiguous(), budgets.long())
    return matches_where(affinities, chosen.T.contiguous())


def threshold_choice(affinities: Tensor, threshold: Tensor | float) -> Matches:
    """Take every pair whose affinity is above a threshold: the batch-free form of a choice.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        threshold: One number, or one a feature, shape (features,). Negative ones act as zero.

    Example:
        >>> threshold_choice(torch.tensor([[3.0, 1.0, -1.0]]), -2.0).to_dense()
        tensor([[3., 1., 0.]])
    """
    _shape(affinities)
    scores = _scores(affinities)
    return matches_where(affinities, (scores > threshold) & (scores > 0))


def midpoint_thresholds(affinities: Tensor, matches: Matches) -> Tensor:
    """Return, for each feature, the midpoint of its last chosen and first rejected affinity.

    As a threshold the last chosen affinity would fire too rarely on new tokens and the first
    rejected one too often; the midpoint is close to unbiased. A feature that chose every token
    gets its last chosen affinity, and one that chose none its first rejected affinity. Never
    negative. No gradient. (Reconstructed: the paper's own inference procedure is not known.)

    Args:
        affinities: The affinities that were chosen from, shape (tokens, features).
        matches: The matches that were chosen.

    Returns:
        Shape (features,), float32 or wider.

    Example:
        >>> affinities = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> midpoint_thresholds(affinities, feature_choice(affinities, torch.tensor([1, 2])))
        tensor([3., 1.])
    """
    scores = _scores(affinities)
    rejected = scores.index_put((matches.token, matches.feature), scores.new_tensor(-torch.inf))
    first_rejected = rejected.amax(0)
    last_chosen = scores.new_full((scores.shape[1],), torch.inf).scatter_reduce(
        0, matches.feature, scores[matches.token, matches.feature], "amin"
    )
    last_chosen = torch.where(last_chosen.isinf(), first_rejected, last_chosen)
    # A token that was turned down for want of a positive affinity sets no bound above zero.
    first_rejected = torch.where(first_rejected.isinf(), last_chosen, first_rejected.clamp_min(0))
    return ((last_chosen + first_rejected) / 2).clamp_min(0)


def _shape(affinities: Tensor) -> tuple[int, int]:
    if affinities.dim() != 2:
        raise ValueError(f"affinities must be (tokens, features), not {tuple(affinities.shape)}")
    tokens, features = affinities.shape
    return tokens, features


def _scores(affinities: Tensor) -> Tensor:
    """Detach and widen: 16-bit scores would tie so often that the choice became arbitrary."""
    return affinities.detach().to(torch.promote_types(affinities.dtype, torch.float32))
