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

Affinities are a tensor, or `Scores` that are computed a tile at a time. Then no tokens x features
are ever in memory, and the matches' values are their scores.
"""

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.selection.candidates import (
    candidates_of_batch,
    candidates_of_features,
    candidates_of_tokens,
    largest_of,
)
from lightning_sae.selection.scores import Scores, TensorScores


def token_choice(affinities: Tensor | Scores, k: int) -> Matches:
    """Let every token choose its k features of largest affinity.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        k: Matches a token may take, 1 to features.

    Raises:
        ValueError: If k is out of range or the affinities are not two-dimensional.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> token_choice(torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, -2.0]]), k=2).to_dense()
        tensor([[3.0000, 0.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    scores = as_scores(affinities)
    features = scores.shape[1]
    if not 1 <= k <= features:
        raise UsageError(f"k={k} is out of range: a token has 1 to {features} features to choose")
    return valued(candidates_of_tokens(scores, k), affinities)


def mutual_choice(affinities: Tensor | Scores, budget: int, guess: float | None = None) -> Matches:
    """Choose the `budget` pairs of largest affinity in the whole batch.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: Matches the batch may take, 0 to tokens * features; k * tokens for an expected k
            matches a token.
        guess: What the smallest chosen affinity will hardly be below. It has no influence on
            the choice. If it is close, fewer pairs are looked at; if it is too large, all are
            computed again.

    Raises:
        ValueError: If the budget is out of range or the affinities are not two-dimensional.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> mutual_choice(torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]]), budget=3).to_dense()
        tensor([[3., 1., 2.],
                [0., 0., 0.]])
    """
    scores = as_scores(affinities)
    tokens, features = scores.shape
    if not 0 <= budget <= tokens * features:
        raise UsageError(
            f"budget={budget} is out of range: the batch has {tokens * features} pairs"
        )
    found = candidates_of_batch(scores, budget, guess)
    if guess is not None and len(found) < budget:
        found = candidates_of_batch(scores, budget)
    return valued(largest_of(found, budget).sort(), affinities)


def feature_choice(affinities: Tensor | Scores, budgets: Tensor) -> Matches:
    """Let every feature choose its tokens of largest affinity.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budgets: Matches each feature may take, integers from 0 to tokens, shape (features,).

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> affinities = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]])
        >>> feature_choice(affinities, torch.tensor([1, 2, 1])).to_dense()
        tensor([[3.0000, 1.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    scores = as_scores(affinities)
    tokens, features = scores.shape
    require_budgets(budgets, features)
    if features and not 0 <= int(budgets.min()) <= int(budgets.max()) <= tokens:
        raise UsageError(
            f"budgets from {int(budgets.min())} to {int(budgets.max())} are out of range: "
            f"the batch has {tokens} tokens"
        )
    return valued(candidates_of_features(scores, budgets.long()), affinities)


def threshold_choice(affinities: Tensor | Scores, threshold: Tensor | float) -> Matches:
    """Take every pair whose affinity is above a threshold: the batch-free form of a choice.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        threshold: One number, or one a feature, shape (features,). Negative ones act as zero.

    Raises:
        ValueError: If the affinities are not two-dimensional.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> threshold_choice(torch.tensor([[3.0, 1.0, -1.0]]), -2.0).to_dense()
        tensor([[3., 1., 0.]])
    """
    return valued(as_scores(affinities).above(torch.as_tensor(threshold)), affinities)


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
    scores = as_scores(affinities).dense()
    rejected = scores.index_put((matches.token, matches.feature), scores.new_tensor(-torch.inf))
    first_rejected = rejected.amax(0)
    last_chosen = scores.new_full((scores.shape[1],), torch.inf).scatter_reduce(
        0, matches.feature, scores[matches.token, matches.feature], "amin"
    )
    last_chosen = torch.where(last_chosen.isinf(), first_rejected, last_chosen)
    # A token that was turned down for want of a positive affinity sets no bound above zero.
    first_rejected = torch.where(first_rejected.isinf(), last_chosen, first_rejected.clamp_min(0))
    return ((last_chosen + first_rejected) / 2).clamp_min(0)


def as_scores(affinities: Tensor | Scores) -> Scores:
    """Return what a choice reads: a tensor is given the interface of scores."""
    return affinities if isinstance(affinities, Scores) else TensorScores(affinities)


def valued(chosen: Matches, affinities: Tensor | Scores) -> Matches:
    """Give matches, so far with their scores, the affinities of a tensor, type and gradient too."""
    if isinstance(affinities, Tensor):
        chosen.value = affinities[chosen.token, chosen.feature]
    return chosen


def require_budgets(budgets: Tensor, features: int) -> None:
    """Raise unless there is one integer a feature."""
    if budgets.shape != (features,) or budgets.is_floating_point():
        raise UsageError(
            f"budgets must be {features} integers, one a feature, "
            f"not {budgets.dtype} of shape {tuple(budgets.shape)}"
        )
