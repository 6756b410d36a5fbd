"""Threshold choice: a token takes what is above thresholds, which stand for a batch at inference.

Source of the idea: Bussmann et al. 2024 (BatchTopK, arXiv 2412.06410), who have one threshold for
all features. One a feature, as `midpoint_thresholds` finds them for feature choice, is
reconstructed: how Ayonrinde 2024 (arXiv 2411.02124) infers without a batch is not known to us.
"""

import torch
from torch import Tensor

from lightning_sae.allocation.across_ranks import among_largest_of_all, total_length
from lightning_sae.allocation.affinities import Affinities, as_scores, valued
from lightning_sae.allocation.common_threshold import cut_above
from lightning_sae.allocation.feature_choice import feature_choice, require_budgets
from lightning_sae.allocation.rank_discount import RankDiscount
from lightning_sae.host_copy import look
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from lightning_sae.selection import pairs_above

_SMALLEST = 1e-12  # a threshold that scores are divided by
_ROOM = 3  # for how many times as many pairs as are expected a search has room


def threshold_choice(
    affinities: Affinities,
    threshold: Tensor | float,
    *,
    discount: RankDiscount | None = None,
    expected: int | None = None,
) -> Matches:
    """Take every pair whose affinity is above a threshold.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        threshold: One number, or one a feature, shape (features,). Negative ones act as zero.
        discount: What pairs are worth beside larger ones of their token, all as multiples of their
            features' thresholds. Default: their affinity.
        expected: About how many pairs that will be. It has no influence on the choice; without it
            a GPU is waited for more often.

    Raises:
        ValueError: If the affinities are not two-dimensional.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> threshold_choice(torch.tensor([[3.0, 1.0, -1.0]]), -2.0).to_dense()
        tensor([[3., 1., 0.]])
    """
    thresholds, scores = torch.as_tensor(threshold), as_scores(affinities)
    if scores.search is not None and expected:
        each = thresholds.to(scores.device).expand(scores.shape[1])
        found, sound = scores.search.some_above(each, _ROOM * expected)
        chosen = (found.value > 0) & _is_worth_it(found, thresholds, discount)
        number, is_sound = look(chosen.sum(), sound)
        if is_sound:
            return valued(found.select(chosen, number).sort(), affinities)
    found = pairs_above(scores, thresholds)
    if discount is not None:
        found = found.select(_is_worth_it(found, thresholds, discount))
    return valued(found, affinities)


def _is_worth_it(found: Matches, thresholds: Tensor, discount: RankDiscount | None) -> Tensor:
    """Return which pairs are above their thresholds also beside larger ones of their token."""
    if discount is None:
        return torch.ones_like(found.token, dtype=torch.bool)
    own = thresholds.to(found.value).expand(found.shape[1])[found.feature]
    share = discount.share(found.token, found.value / own.clamp_min(_SMALLEST))
    return found.value * share > own


def midpoint_thresholds(
    affinities: Affinities, budgets: Tensor, *, ranks: Ranks | None = None
) -> Tensor:
    """Return, for each feature, the midpoint of its last chosen and first rejected affinity.

    As a threshold the last chosen affinity would fire too rarely on new tokens and the first
    rejected one too often; the midpoint is close to unbiased. A feature that chose every token
    gets its last chosen affinity, and one that chose none its first rejected affinity. Never
    negative. No gradient.

    Args:
        affinities: What is chosen from, shape (tokens, features).
        budgets: As in `feature_choice`.
        ranks: As in `feature_choice`.

    Returns:
        Shape (features,), float32 or wider, the same on all ranks.

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
        FloatingPointError: If an affinity of this rank is NaN or infinite.

    Example:
        >>> affinities = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> midpoint_thresholds(affinities, torch.tensor([1, 2]))
        tensor([3., 1.])
    """
    scores = as_scores(affinities)
    tokens = total_length(scores, ranks)
    require_budgets(budgets, scores.shape[1], tokens, ranks)
    # The first that is rejected is the last of one more.
    found = feature_choice(scores, (budgets + 1).clamp(max=tokens), ranks=ranks)
    chosen = among_largest_of_all(
        found.feature, found.value, budgets, ranks, own_tokens=len(scores), all_tokens=tokens
    )
    choice, rejects = found.select(chosen), found.select(~chosen)
    last = found.value.new_full((scores.shape[1],), torch.inf)
    last = last.scatter_reduce(0, choice.feature, choice.value, "amin")
    # Tokens turned down for want of a positive affinity are not among those found: zero.
    first = torch.zeros_like(last).scatter_reduce(0, rejects.feature, rejects.value, "amax")
    taken = choice.per_feature()
    if ranks is not None:
        last, first = ranks.all_reduce(last, "min"), ranks.all_reduce(first, "max")
        taken = ranks.all_reduce(taken)
    last = torch.where(last.isinf(), first, last)
    return (last + torch.where(taken == tokens, last, first)) / 2


def scaled_thresholds(
    affinities: Affinities,
    thresholds: Tensor,
    budget: int,
    *,
    discount: RankDiscount | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Return thresholds times the one factor by which `budget` pairs are above them.

    What they are to each other stays. If fewer affinities than that are positive, all of these are
    above what is returned.

    Args:
        affinities: What is chosen from, shape (tokens, features).
        thresholds: Positive, one a feature, shape (features,).
        budget: How many pairs, of all ranks together, are to be above.
        discount: As in `threshold_choice`.
        ranks: As in `feature_choice`.

    Returns:
        In the shape of `thresholds`, the same on all ranks.

    Raises:
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> affinities = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> threshold_choice(affinities, scaled_thresholds(affinities, torch.ones(2), 3)).value
        tensor([4., 2., 3.])
    """
    scores = as_scores(affinities)
    factor = 1.0
    while True:  # until there are enough to count among
        found = pairs_above(scores, thresholds * factor)
        multiple = found.value / thresholds[found.feature]
        if discount is not None:
            multiple = discount(found.token, multiple)
        if factor == 0 or total_length(multiple[multiple > factor], ranks) > budget:
            break
        factor = 0.7 * factor if factor > 1e-3 else 0.0
    return thresholds * cut_above(multiple, budget, least=factor, ranks=ranks)
