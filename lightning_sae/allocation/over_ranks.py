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

from lightning_sae.allocation.choices import feature_choice, midpoint_thresholds, mutual_choice
from lightning_sae.allocation.matches import Matches, matches_where
from lightning_sae.allocation.ranking import kth_largest
from lightning_sae.distributed import (
    gather_over_ranks,
    length_over_ranks,
    max_over_ranks,
    min_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)


def mutual_choice_over_ranks(affinities: Tensor, budget: int) -> Matches:
    """Choose the `budget` pairs of largest affinity among all ranks' tokens.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features); tokens may differ by rank.
        budget: Matches that all ranks may take together, the same on each.

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If the budget is out of range.
    """
    if world_size() == 1:
        return mutual_choice(affinities, budget)
    scores = _scores(affinities).reshape(1, -1)
    chosen = _largest_positive(scores, torch.tensor([budget], device=scores.device))
    return matches_where(affinities, chosen.view(affinities.shape))


def feature_choice_over_ranks(affinities: Tensor, budgets: Tensor) -> Matches:
    """Let every feature choose its tokens of largest affinity among those of all ranks.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features); tokens may differ by rank.
        budgets: Matches each feature may take on all ranks together, integers, the same on each
            rank, shape (features,).

    Returns:
        The matches of this rank's tokens.

    Raises:
        ValueError: If a budget is out of range, or the shapes do not fit.
    """
    if world_size() == 1:
        return feature_choice(affinities, budgets)
    if budgets.shape != affinities.shape[1:] or budgets.is_floating_point():
        raise ValueError(
            f"budgets must be {affinities.shape[1]} integers, one a feature, "
            f"not {budgets.dtype} of shape {tuple(budgets.shape)}"
        )
    chosen = _largest_positive(_scores(affinities).T.contiguous(), budgets.long())
    return matches_where(affinities, chosen.T.contiguous())


def midpoint_thresholds_over_ranks(affinities: Tensor, matches: Matches) -> Tensor:
    """Return each feature's midpoint of its last chosen and first rejected affinity on any rank.

    Args:
        affinities: Of this rank's tokens, shape (tokens, features).
        matches: Those of `feature_choice_over_ranks` on this rank.

    Returns:
        As `midpoint_thresholds`, the same on all ranks, shape (features,).
    """
    scores = _scores(affinities)
    features = scores.shape[1]
    pairs = (matches.token, matches.feature)
    last = scores.new_full((features,), torch.inf)
    last = min_over_ranks(last.scatter_reduce(0, matches.feature, scores[pairs], "amin"))
    rejected = torch.cat([scores, scores.new_full((1, features), -torch.inf)])  # never empty
    rejected[pairs] = -torch.inf
    first = max_over_ranks(rejected.amax(0))
    # These two affinities of a feature decide, so a batch of them alone has the same midpoints.
    chosen = torch.stack([last.isfinite(), torch.zeros_like(last, dtype=torch.bool)])
    both = torch.stack([last.where(last.isfinite(), -torch.inf), first])  # (2, features)
    return midpoint_thresholds(both, matches_where(both, chosen))


def _largest_positive(rows: Tensor, counts: Tensor) -> Tensor:
    """Do as `ranking.largest_positive` for rows whose columns are spread over the ranks in order.

    Args:
        rows: Scores in the columns of this rank, shape (rows, columns).
        counts: How many entries each row may take on all ranks together, int64, shape (rows,).

    Returns:
        Boolean mask of the shape of `rows`.

    Raises:
        ValueError: If a row is to take fewer than 0 or more than all entries.
    """
    columns = length_over_ranks(rows.T)
    if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= columns:
        raise ValueError(
            f"budgets from {int(counts.min())} to {int(counts.max())} are out of range: each is of "
            f"{columns} pairs on {world_size()} ranks"
        )
    low, high = _bracket(rows, counts, columns)
    chosen = rows > high.unsqueeze(1)  # for sure
    vacancies = counts - sum_over_ranks(chosen.sum(1))  # (rows,)
    in_question = (rows >= low.unsqueeze(1)) & (rows > 0) & ~chosen
    row, column = in_question.nonzero(as_tuple=True)
    # In float64, row numbers and float32 scores are exact and travel together.
    candidates = torch.stack([row.double(), rows[row, column].double()], dim=1)  # (candidates, 2)
    worth_sending = _among_largest(candidates, vacancies)
    everyones = gather_over_ranks(candidates[worth_sending])
    taken = _among_largest(torch.cat(everyones), vacancies)
    own = taken.split([len(each) for each in everyones])[rank()]
    chosen[row[worth_sending], column[worth_sending]] = own
    return chosen


def _bracket(rows: Tensor, counts: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return bounds (rows,) of each row's last chosen entry, as far as it is positive.

    All ranks reserve at least `counts` entries together, so the lowest of their cuts is low enough.
    Above the highest of them there are less than `counts`: a rank has fewer there than it reserved,
    and what it reserved is rounded up by less than one.
    """
    reserved = -(-counts * rows.shape[1] // max(columns, 1))  # rounded up
    # Where a rank has nothing to reserve its cut is infinite, and no entry is sure of its place.
    cut = kth_largest(rows, reserved)
    low, minus_high = min_over_ranks(torch.stack([cut, -cut]))
    return low, (-minus_high).clamp_min(0)


def _among_largest(candidates: Tensor, vacancies: Tensor) -> Tensor:
    """Mark each row's `vacancies` largest candidates; of equal ones the first come first.

    Args:
        candidates: Row and score of each, shape (candidates, 2).
        vacancies: How many each row may take, int64, shape (rows,).
    """
    row, score = candidates[:, 0].long(), candidates[:, 1]
    order = score.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, the largest first
    row = row[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return torch.zeros_like(row, dtype=torch.bool).index_put((order,), place < vacancies[row])


def _scores(affinities: Tensor) -> Tensor:
    """Detach and widen, as every choice does."""
    return affinities.detach().to(torch.promote_types(affinities.dtype, torch.float32))
