"""Mutual choice: the batch takes the pairs of largest affinity, wherever they are.

Source: Ayonrinde 2024 (arXiv 2411.02124). The allocation is that of BatchTopK (Bussmann et al.
2024, arXiv 2412.06410). The discount is ours.
"""

import torch
from torch import Tensor

from lightning_sae.allocation.across_ranks import among_largest_of_all, on_ranks, total_length
from lightning_sae.allocation.affinities import Affinities, as_scores, valued
from lightning_sae.allocation.rank_discount import RankDiscount
from lightning_sae.checks import UsageError
from lightning_sae.host_copy import look
from lightning_sae.matches import Matches
from lightning_sae.numerics import just_below
from lightning_sae.parallel import Ranks
from lightning_sae.selection import (
    Scores,
    among_largest_pairs,
    candidates_of_batch,
    largest_pairs,
    pairs_above,
)

_ROOM = 2  # for how many times as many pairs as are chosen a search has room
_ROOM_FOR_CROWDED = 3  # where many are above a cut that are worth less


def mutual_choice(
    affinities: Affinities,
    budget: int,
    guess: Tensor | float | None = None,
    *,
    discount: RankDiscount | None = None,
    ranks: Ranks | None = None,
) -> Matches:
    """Choose the `budget` pairs of largest affinity in the whole batch.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: Matches the batch may take, 0 to tokens * features; k * tokens for an expected k
            matches a token.
        guess: What the smallest chosen affinity will hardly be below. It has no influence on
            the choice. If it is close, fewer pairs are looked at; if it is too large, all are
            computed again.
        discount: What pairs are worth beside larger ones of their token. Default: their affinity.
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
    alone = ranks is None or ranks.size == 1
    if alone and budget > 0 and guess is not None:
        at_once = _at_once(scores, budget, guess, discount)
        if at_once is not None:
            return valued(at_once, affinities)
    found, worth = _candidates(scores, budget, guess, discount, ranks)
    if alone:
        chosen = among_largest_pairs(found.token, worth, budget)
        return valued(found.select(chosen).sort(), affinities)
    order = found.token.argsort(stable=True)
    found, worth = found.select(order), worth[order]
    everything, budgets = torch.zeros_like(found.token), found.token.new_tensor([budget])
    chosen = among_largest_of_all(
        everything, worth, budgets, ranks, own_tokens=len(scores), all_tokens=tokens
    )
    return valued(found.select(chosen), affinities)


def _at_once(
    scores: Scores, budget: int, guess: Tensor | float, discount: RankDiscount | None
) -> Matches | None:
    """Return the choice if it is among what a search finds above the guess, else nothing.

    The device is asked once, when all is done, whether it was so.
    """
    if scores.search is None:
        return None
    guess = torch.as_tensor(guess, device=scores.device)
    room = budget * (_ROOM if discount is None else _ROOM_FOR_CROWDED)
    found, sound = scores.search.some_above(just_below(guess).reshape(1), room)
    worth = found.value if discount is None else discount(found.token, found.value)
    cut = worth.topk(budget).values[-1]
    chosen = worth >= cut
    enough = (cut >= guess) & (cut > 0)
    number, is_sound = look(chosen.sum(), sound & enough)
    if not is_sound:
        return None
    if number > budget:  # equal ones
        chosen = among_largest_pairs(found.token, worth, budget)
    return found.select(chosen, budget).sort()


def _candidates(
    scores: Scores,
    budget: int,
    guess: Tensor | float | None,
    discount: RankDiscount | None,
    ranks: Ranks | None,
) -> tuple[Matches, Tensor]:
    """Return pairs, sorted by feature, that hold the `budget` of most worth, and what each is."""
    if discount is not None:
        return _discounted(scores, budget, guess, discount, ranks)
    found = candidates_of_batch(scores, budget, guess)
    if guess is not None and total_length(found.token, ranks) < budget and guess > 0:
        found = candidates_of_batch(scores, budget)
    return found, found.value


def _discounted(
    scores: Scores,
    budget: int,
    guess: Tensor | float | None,
    discount: RankDiscount,
    ranks: Ranks | None,
) -> tuple[Matches, Tensor]:
    """Do as `_candidates` does.

    What a pair is worth is at most its score, and shows beside all the larger ones of its token.
    """
    if guess is not None:
        found = pairs_above(scores, just_below(torch.as_tensor(guess, device=scores.device)))
        worth = discount(found.token, found.value)
        if total_length(worth[worth >= guess], ranks) >= budget:
            _, _, by_feature = found.by_feature
            return found.select(by_feature), worth[by_feature]
    wanted, everything = budget, scores.shape[0] * scores.shape[1]
    while True:
        wanted = min(2 * wanted, everything)
        found = largest_pairs(candidates_of_batch(scores, wanted), wanted)
        worth = discount(found.token, found.value)
        all_found = wanted == everything or len(found) < max(1, wanted)
        if all_found or int((worth > found.value.min()).sum()) >= budget:
            return found, worth
