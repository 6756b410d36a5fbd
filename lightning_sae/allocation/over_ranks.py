"""The same choices where a batch is spread over ranks, each with some of its tokens.

What N ranks choose is what one rank would choose from all their tokens, laid end to end in the
order of ranks, ties included. Every rank calls with its own affinities and the budget of the whole
batch, and gets the matches of its own tokens. (In token choice ranks need not know of each other.)

Ranks first reserve a share of each budget in proportion to their tokens. Where these reserves end
brackets where the whole budget ends, so that only the pairs in between, the square root of a budget
or so, are sent around. However unlike the ranks are, none sends more pairs than its budget; N x F
affinities never travel.
"""

import torch
from torch import Tensor

from lightning_sae.allocation.choices import (
    as_scores,
    feature_choice,
    mutual_choice,
    require_budgets,
    valued,
)
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel.legacy import (
    gather_over_ranks,
    length_over_ranks,
    max_over_ranks,
    min_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from lightning_sae.selection.candidates import candidates_of_batch, candidates_of_features
from lightning_sae.selection.ranking import among_largest, places
from lightning_sae.selection.scores import Scores


def mutual_choice_over_ranks(
    affinities: Tensor | Scores, budget: int, guess: float | None = None
) -> Matches:
    """Choose the `budget` pairs of largest affinity among all ranks' tokens.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features); tokens may differ by rank.
        budget: Matches that all ranks may take together, the same on each.
        guess: As in `mutual_choice`, the same on each rank.

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If the budget is out of range.
        FloatingPointError: If an affinity of this rank is NaN or infinite.
    """
    if world_size() == 1:
        return mutual_choice(affinities, budget, guess)
    scores = as_scores(affinities)
    tokens = length_over_ranks(scores)
    budgets = torch.tensor([budget], device=scores.device)
    _require_range(budgets, tokens * scores.shape[1])
    found = candidates_of_batch(scores, budget, guess)
    if guess is not None and length_over_ranks(found.token) < budget:
        found = candidates_of_batch(scores, budget)
    found = found.sort()
    reserved = _reserve(budgets, len(scores), tokens)
    chosen = _largest(torch.zeros_like(found.token), found.value, budgets, reserved)
    return valued(found.select(chosen), affinities)


def feature_choice_over_ranks(affinities: Tensor | Scores, budgets: Tensor) -> Matches:
    """Let every feature choose its tokens of largest affinity among those of all ranks.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features); tokens may differ by rank.
        budgets: Matches each feature may take on all ranks together, integers, the same on each
            rank, shape (features,).

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
        FloatingPointError: If an affinity of this rank is NaN or infinite.
    """
    if world_size() == 1:
        return feature_choice(affinities, budgets)
    scores = as_scores(affinities)
    require_budgets(budgets, scores.shape[1])
    tokens = length_over_ranks(scores)
    _require_range(budgets, tokens)
    found = candidates_of_features(scores, budgets.clamp(max=len(scores)))
    reserved = _reserve(budgets, len(scores), tokens)
    chosen = _largest(found.feature, found.value, budgets, reserved)
    return valued(found.select(chosen), affinities)


def midpoint_thresholds_over_ranks(affinities: Tensor | Scores, budgets: Tensor) -> Tensor:
    """Return each feature's midpoint of its last chosen and first rejected affinity on any rank.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features).
        budgets: As for `feature_choice_over_ranks`.

    Returns:
        As `midpoint_thresholds` of what that chooses, the same on all ranks, shape (features,).
    """
    scores = as_scores(affinities)
    tokens = length_over_ranks(scores)
    # The first that is rejected is the last of one more.
    found = feature_choice_over_ranks(scores, (budgets + 1).clamp(max=tokens))
    reserved = _reserve(budgets, len(scores), tokens)
    chosen = _largest(found.feature, found.value, budgets, reserved)
    choice, rejects = found.select(chosen), found.select(~chosen)
    last = found.value.new_full((scores.shape[1],), torch.inf)
    last = min_over_ranks(last.scatter_reduce(0, choice.feature, choice.value, "amin"))
    # Tokens turned down for want of a positive affinity are not among those found: zero.
    first = torch.zeros_like(last).scatter_reduce(0, rejects.feature, rejects.value, "amax")
    first = max_over_ranks(first)
    last = torch.where(last.isinf(), first, last)
    everyone = sum_over_ranks(choice.per_feature()) == tokens
    return (last + torch.where(everyone, last, first)) / 2


def _largest(row: Tensor, score: Tensor, counts: Tensor, reserved: Tensor) -> Tensor:
    """Mark the entries of this rank that are among the largest of their rows on all ranks.

    Args:
        row: Row of each candidate, int64, shape (candidates,). Its positive entries, of each row
            the `counts[i]` largest at least; ties by their order, then by rank.
        score: Positive, shape (candidates,).
        counts: How many entries each row may take on all ranks together, int64, shape (rows,).
        reserved: How many of them this rank reserves, int64, shape (rows,).

    Returns:
        Boolean mask, shape (candidates,).
    """
    low, high = _bracket(row, score, reserved)
    sure = score > high[row]
    vacancies = counts - sum_over_ranks(torch.bincount(row[sure], minlength=len(counts)))
    in_question = ((score >= low[row]) & ~sure).nonzero().squeeze(1)
    row, score = row[in_question], score[in_question]
    sent = among_largest(row, score, vacancies)
    # In float64, row numbers and float32 scores are exact and travel together.
    everyones = gather_over_ranks(torch.stack([row.double(), score.double()], 1)[sent])
    everyone = torch.cat(everyones)
    taken = among_largest(everyone[:, 0].long(), everyone[:, 1], vacancies)
    own = taken.split([len(each) for each in everyones])[rank()]
    sure[in_question[sent]] = own
    return sure


def _reserve(counts: Tensor, tokens: int, of_tokens: int) -> Tensor:
    """Return this rank's part of some counts, in proportion to its tokens, rounded up."""
    return -(-counts * tokens // max(1, of_tokens))


def _bracket(row: Tensor, score: Tensor, reserved: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds (rows,) of each row's last chosen entry on all ranks.

    All ranks reserve at least `counts` entries together, so the lowest of their cuts is low enough.
    Above the highest of them there are less than `counts`: a rank has fewer there than it reserved,
    and what it reserved is rounded up by less than one.
    """
    order, place = places(row, score)
    last = place == reserved[row[order]] - 1
    # A rank that reserves more than it has is cut at zero; one that reserves nothing, nowhere.
    cut = score.new_zeros(len(reserved)).masked_fill(reserved == 0, torch.inf)
    cut[row[order][last]] = score[order][last]
    low, minus_high = min_over_ranks(torch.stack([cut, -cut]))
    return low, -minus_high


def _require_range(budgets: Tensor, pairs: int) -> None:
    if len(budgets) and not 0 <= int(budgets.min()) <= int(budgets.max()) <= pairs:
        raise UsageError(
            f"budgets from {int(budgets.min())} to {int(budgets.max())} are out of range: each is "
            f"of {pairs} pairs on {world_size()} ranks"
        )
