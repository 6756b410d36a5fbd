"""Feature choice: every feature takes its tokens of largest affinity, as many as its budget says.

Source: Ayonrinde 2024 (arXiv 2411.02124). In mixtures of experts it is expert choice (Zhou et al.
2022, arXiv 2202.09368).
"""

from torch import Tensor

from lightning_sae.allocation.across_ranks import among_largest_of_all, on_ranks, total_length
from lightning_sae.allocation.affinities import Affinities, as_scores, valued
from lightning_sae.allocation.choice import Choice
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from lightning_sae.selection import largest_of_each_feature


def feature_choice(
    affinities: Affinities, budgets: Tensor, *, ranks: Ranks | None = None
) -> Matches:
    """Let every feature choose its tokens of largest affinity.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budgets: Matches each feature may take, integers from 0 to tokens, shape (features,).
        ranks: The processes that have the tokens of the batch, each with its own, however many.
            Budgets are for all together, and the same on each. Default: this one alone.

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
        FloatingPointError: If an affinity of this rank is NaN or infinite.

    Example:
        >>> import torch
        >>> affinities = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]])
        >>> feature_choice(affinities, torch.tensor([1, 2, 1])).to_dense()
        tensor([[3.0000, 1.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    return _choose(affinities, budgets, None, ranks).matches


def feature_choice_counting(
    affinities: Affinities, budgets: Tensor, thresholds: Tensor, *, ranks: Ranks | None = None
) -> Choice:
    """Let features choose as in `feature_choice`, and count what is above thresholds on the way.

    Args:
        affinities: As in `feature_choice`.
        budgets: As in `feature_choice`.
        thresholds: One a feature, shape (features,). Negative ones act as zero; nothing is above
            NaN.
        ranks: As in `feature_choice`.

    Returns:
        The matches of this rank's tokens, and how many of its tokens are above each threshold.

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
        FloatingPointError: If an affinity of this rank is NaN or infinite.

    Example:
        >>> import torch
        >>> affinities = torch.tensor([[3.0, 1.0], [0.1, 0.5]])
        >>> budgets, thresholds = torch.tensor([1, 1]), torch.tensor([1.0, 0.2])
        >>> feature_choice_counting(affinities, budgets, thresholds).passing
        tensor([1, 2])
    """
    return _choose(affinities, budgets, thresholds, ranks)


def _choose(
    affinities: Affinities, budgets: Tensor, thresholds: Tensor | None, ranks: Ranks | None
) -> Choice:
    scores = as_scores(affinities)
    features = scores.shape[1]
    if thresholds is not None and thresholds.shape != (features,):
        raise UsageError(
            f"thresholds must be {features} numbers, one a feature, "
            f"not of shape {tuple(thresholds.shape)}"
        )
    tokens = total_length(scores, ranks)
    require_budgets(budgets, features, tokens, ranks)
    budgets = budgets.long()
    found, passing = largest_of_each_feature(scores, budgets.clamp(max=len(scores)), thresholds)
    if ranks is not None and ranks.size > 1:
        chosen = among_largest_of_all(
            found.feature, found.value, budgets, ranks, own_tokens=len(scores), all_tokens=tokens
        )
        found = found.select(chosen)
    return Choice(valued(found, affinities), passing)


def require_budgets(budgets: Tensor, features: int, tokens: int, ranks: Ranks | None) -> None:
    """Raise unless there is one integer a feature, from 0 to all ranks' tokens.

    Raises:
        ValueError: If there is not.
    """
    if budgets.shape != (features,) or budgets.is_floating_point():
        raise UsageError(
            f"budgets must be {features} integers, one a feature, "
            f"not {budgets.dtype} of shape {tuple(budgets.shape)}"
        )
    if features and not 0 <= int(budgets.min()) <= int(budgets.max()) <= tokens:
        raise UsageError(
            f"budgets from {int(budgets.min())} to {int(budgets.max())} are out of range: "
            f"the batch has {tokens} tokens{on_ranks(ranks)}"
        )
