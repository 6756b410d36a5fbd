"""One pass over the tiles of scores, that keeps the few pairs among which a choice is made."""

import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection.found import Found
from lightning_sae.selection.ranking import among_largest
from lightning_sae.selection.scores import Scores


def candidates_of_batch(scores: Scores, budget: int, guess: float | None = None) -> Matches:
    """Return pairs that hold the `budget` largest positive ones of the batch.

    Args:
        scores: Of all pairs.
        budget: How many pairs are wanted. Of tiles, at most twice as many are held at any time,
            beside those of one tile.
        guess: Pairs below are left out: if fewer than the budget are found, it was too large.

    Returns:
        Pairs with their scores as values, sorted by feature, then by token.
    """
    if scores.search is not None:
        searched = scores.search.of_batch(budget, guess)
        if searched is not None:
            return searched
    found = Found(scores.shape, 2 * budget, scores.device)
    bound = torch.tensor(guess or 0.0, device=scores.device)
    for start, tile in scores.feature_tiles():
        if guess is None:
            bound = bound.maximum(tile.bound(budget)) if budget else bound
        feature, token, score = tile.above(bound)
        found.add(token, feature + start, score)
        if len(found) > 2 * budget:
            kept = largest_of(found.pairs(), budget)
            found.clear()
            found.add(kept.token, kept.feature, kept.value)
            bound = kept.value.min() if budget else bound
    return scores.collect(found.pairs())


def largest_of(pairs: Matches, count: int) -> Matches:
    """Return the `count` pairs of largest value; of equal ones those of the first tokens.

    Args:
        pairs: Sorted by feature, then by token.
        count: From 0; all are returned if there are fewer.

    Returns:
        Pairs in the order they were in.
    """
    if count == 0 or count >= len(pairs):
        return pairs.select(pairs.token.new_ones(len(pairs), dtype=torch.bool) & (count > 0))
    cut = pairs.value.topk(count).values[-1]
    chosen = pairs.value >= cut
    surplus = int(chosen.sum()) - count
    if surplus:  # equal ones: drop the last
        tied = (pairs.value == cut).nonzero().squeeze(1)
        chosen[tied[pairs.token[tied].argsort(stable=True)[-surplus:]]] = False
    return pairs.select(chosen)


def candidates_of_tokens(scores: Scores, count: int) -> Matches:
    """Return the `count` largest positive pairs of each token.

    Args:
        scores: Of all pairs. Of tiles, at most three times as many as are wanted are held at any
            time, beside those of one tile.
        count: From 1 to features.

    Returns:
        Pairs with their scores as values, sorted by token, then by feature.
    """
    if scores.search is not None:
        searched = scores.search.of_tokens(count)
        if searched is not None:
            return searched
    most = min(2 * count, scores.shape[1])
    found = Found(scores.shape, len(scores) * most, scores.device)
    largest = None  # of each token, so far
    for tokens, start, tile in scores.token_tiles():
        if largest is None:
            largest = tile.rows.new_zeros(len(scores), count)
        # Where there are bounds already, block maxima are enough to raise them.
        first = start == scores.share.here.start
        entries = tile.entries(count) if first else tile.maxima
        largest[tokens] = torch.cat([largest[tokens], entries], 1).topk(count).values
        token, feature, score = tile.above(largest[tokens, -1])
        found.add(token + tokens.start, feature + start, score)
        if len(found) > 3 * len(scores) * count:  # larger ones came later and later
            kept = largest_of_tokens(found.pairs(), count)
            found.clear()
            found.add(kept.token, kept.feature, kept.value)
    pairs = largest_of_tokens(found.pairs(), count)
    if scores.share.mesh is None:
        return pairs
    return largest_of_tokens(scores.collect(pairs), count)


def largest_of_tokens(pairs: Matches, count: int) -> Matches:
    """Return the `count` pairs of largest value of each token; of equal ones the first features.

    Args:
        pairs: The features of each token ascend.
        count: All are returned of a token that has fewer.

    Returns:
        Pairs sorted by token, then by feature.
    """
    counts = pairs.token.new_full(pairs.shape[:1], count)
    pairs = pairs.select(among_largest(pairs.token, pairs.value, counts))
    return pairs.select(pairs.token.argsort(stable=True))


def candidates_of_features(scores: Scores, budgets: Tensor) -> Matches:
    """Return the `budgets[i]` largest positive pairs of each feature i.

    Args:
        scores: Of all pairs.
        budgets: int64, shape (features,), 0 to tokens.

    Returns:
        Pairs with their scores as values, sorted by token, then by feature.
    """
    if scores.search is not None:
        searched = scores.search.of_features(budgets, scores.thresholds)
        if searched is not None:
            pairs, scores.passing = searched
            return pairs
    found = Found(scores.shape, int(budgets[scores.share.here].sum()), scores.device)
    for start, tile in scores.feature_tiles():
        feature, token, score = tile.largest(budgets[start : start + len(tile.rows)])
        found.add(token, feature + start, score)
    return scores.collect(found.pairs()).sort()
