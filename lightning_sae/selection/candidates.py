"""One pass over the tiles of scores, that keeps the few pairs among which a choice is made."""

import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection.pair_buffer import PairBuffer
from lightning_sae.selection.ranking import largest_pairs, largest_pairs_of_each_token
from lightning_sae.selection.scores import Scores


def candidates_of_batch(
    scores: Scores, budget: int, guess: Tensor | float | None = None
) -> Matches:
    """Return pairs that hold the `budget` largest positive ones of the batch.

    Args:
        scores: Of all pairs.
        budget: How many pairs are wanted. Of tiles, at most twice as many are held at any time,
            beside those of one tile.
        guess: Pairs below are left out: if fewer than the budget are found, it was too large.

    Returns:
        Pairs with their scores as values, sorted by feature, then by token.

    Raises:
        FloatingPointError: If any score is NaN or infinite, here as in all that follows.
    """
    if scores.search is not None:
        searched = scores.search.candidates_of_batch(budget, guess)
        if searched is not None:
            return searched
    found = PairBuffer(scores.shape, 2 * budget, scores.device)
    bound = torch.as_tensor(0.0 if guess is None else guess, device=scores.device)
    for features, tile in scores.feature_tiles():
        if guess is None:
            bound = bound.maximum(tile.bound(budget)) if budget else bound
        feature, token, score = tile.at_least(bound)
        found.add(token, feature + features.start, score)
        if len(found) > 2 * budget:
            kept = largest_pairs(found.pairs(), budget)
            found.replace(kept)
            bound = kept.value.min() if budget else bound
    return scores.collect(found.pairs())


def largest_of_each_token(scores: Scores, count: int) -> Matches:
    """Return the `count` largest positive pairs of each token.

    Args:
        scores: Of all pairs. Of tiles, at most three times as many as are wanted are held at any
            time, beside those of one tile.
        count: From 1 to features.

    Returns:
        Pairs with their scores as values, sorted by token, then by feature.
    """
    if scores.search is not None:
        searched = scores.search.largest_of_each_token(count)
        if searched is not None:
            return searched
    most = min(2 * count, scores.shape[1])
    found = PairBuffer(scores.shape, len(scores) * most, scores.device)
    largest = None  # of each token, so far
    for tokens, start, tile in scores.token_tiles():
        if largest is None:
            largest = tile.rows.new_zeros(len(scores), count)
        # Where there are bounds already, block maxima are enough to raise them.
        first = start == scores.share.here.start
        entries = tile.entries(count) if first else tile.maxima
        largest[tokens] = torch.cat([largest[tokens], entries], 1).topk(count).values
        token, feature, score = tile.at_least(largest[tokens, -1])
        found.add(token + tokens.start, feature + start, score)
        if len(found) > 3 * len(scores) * count:  # larger ones came later and later
            found.replace(largest_pairs_of_each_token(found.pairs(), count))
    pairs = largest_pairs_of_each_token(found.pairs(), count)
    if scores.share.mesh is None:
        return pairs
    return largest_pairs_of_each_token(scores.collect(pairs), count)


def largest_of_each_feature(
    scores: Scores, counts: Tensor, thresholds: Tensor | None = None
) -> tuple[Matches, Tensor | None]:
    """Return the `counts[i]` largest positive pairs of each feature i, and count in the same pass.

    Args:
        scores: Of all pairs.
        counts: int64, shape (features,), 0 to tokens.
        thresholds: If given, one a feature, shape (features,).

    Returns:
        Pairs with their scores as values, sorted by token, then by feature; and how many positive
        scores are above each feature's threshold, int64, shape (features,), if there is one.
    """
    if scores.search is not None:
        searched = scores.search.largest_of_each_feature(counts, thresholds)
        if searched is not None:
            return searched
    here = scores.share.here
    found = PairBuffer(scores.shape, int(counts[here].sum()), scores.device)
    # Made first: small tensors made between tiles would take the places of freed large ones.
    passing = torch.zeros_like(counts)
    for features, tile in scores.feature_tiles():
        if thresholds is not None:
            passing[features] = tile.count_above(thresholds[features])
        feature, token, score = tile.largest(counts[features])
        found.add(token, feature + features.start, score)
    pairs = scores.collect(found.pairs()).sort()
    return pairs, None if thresholds is None else scores.share.everyones(passing[here])


def pairs_above(scores: Scores, thresholds: Tensor) -> Matches:
    """Return all pairs that are positive and above the threshold of their feature.

    Args:
        scores: Of all pairs.
        thresholds: Shape (features,), or 0-d for one that holds for all.

    Returns:
        Pairs with their scores as values, sorted by token, then by feature.
    """
    thresholds = thresholds.to(scores.device).expand(scores.shape[1])
    if scores.search is not None:
        return scores.search.above(thresholds).sort()
    found = PairBuffer(scores.shape, len(scores), scores.device)  # a feature a token, or more
    for features, tile in scores.feature_tiles():
        feature, token, score = tile.above(thresholds[features])
        found.add(token, feature + features.start, score)
    return scores.collect(found.pairs()).sort()
