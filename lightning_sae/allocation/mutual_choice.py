"""Mutual choice: the batch takes the pairs of largest affinity, wherever they are.

Source: Ayonrinde 2024 (arXiv 2411.02124). The allocation is that of BatchTopK (Bussmann et al.
2024, arXiv 2412.06410).
"""

import torch

from lightning_sae.allocation.across_ranks import among_largest_of_all, on_ranks, total_length
from lightning_sae.allocation.affinities import Affinities, as_scores, valued
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from lightning_sae.selection import candidates_of_batch, largest_pairs


def mutual_choice(
    affinities: Affinities, budget: int, guess: float | None = None, *, ranks: Ranks | None = None
) -> Matches:
    """Choose the `budget` pairs of largest affinity in the whole batch.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: Matches the batch may take, 0 to tokens * features; k * tokens for an expected k
            matches a token.
        guess: What the smallest chosen affinity will hardly be below. It has no influence on
            the choice. If it is close, fewer pairs are looked at; if it is too large, all are
            computed again.
        ranks: The processes that have the tokens of the batch, each with its own, however many.
            Budget and guess are for all together, and the same on each. Default: this one alone.

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If the budget is out of range or the affinities are not two-dimensional.
        FloatingPointError: If an affinity of this rank is NaN or infinite.

    Example:
        >>> affinities = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]])
        >>> mutual_choice(affinities, budget=3).to_dense()
        tensor([[3., 1., 2.],
                [0., 0., 0.]])
    """
    scores = as_scores(affinities)
    tokens = total_length(scores, ranks)
    pairs = tokens * scores.shape[1]
    if not 0 <= budget <= pairs:
        raise UsageError(
            f"budget={budget} is out of range: the batch has {pairs} pairs{on_ranks(ranks)}"
        )
    found = candidates_of_batch(scores, budget, guess)
    if guess is not None and total_length(found.token, ranks) < budget:
        found = candidates_of_batch(scores, budget)
    if ranks is None or ranks.size == 1:
        return valued(largest_pairs(found, budget).sort(), affinities)
    found = found.sort()
    everything, budgets = torch.zeros_like(found.token), found.token.new_tensor([budget])
    chosen = among_largest_of_all(
        everything, found.value, budgets, ranks, own_tokens=len(scores), all_tokens=tokens
    )
    return valued(found.select(chosen), affinities)
