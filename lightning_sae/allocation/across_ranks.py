"""A choice where a batch is spread over ranks, each with some of its tokens.

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

from lightning_sae.parallel import Ranks
from lightning_sae.selection import Scores, among_largest, places


def total_length(rows: Tensor | Scores, ranks: Ranks | None) -> int:
    """Return how many rows there are on all ranks together, or here if there are no others."""
    return len(rows) if ranks is None else ranks.count(rows, rows.device)


def on_ranks(ranks: Ranks | None) -> str:
    """Return how an error message ends where a batch is spread over ranks."""
    return "" if ranks is None or ranks.size == 1 else f" on {ranks.size} ranks"


def among_largest_of_all(
    row: Tensor,
    score: Tensor,
    counts: Tensor,
    ranks: Ranks | None,
    *,
    own_tokens: int,
    all_tokens: int,
) -> Tensor:
    """Mark the entries of this rank that are among the largest of their rows on all ranks.

    Args:
        row: Row of each entry of this rank, int64, shape (entries,). There must be as many of the
            largest positive entries of row i as `counts[i]` at least, or all. Of equal ones the
            first come first, and those of the first ranks.
        score: Positive, shape (entries,).
        counts: How many entries each row may take on all ranks together, int64, shape (rows,).
        ranks: The processes that have entries of these rows. None: this one alone.
        own_tokens: How many tokens this rank has.
        all_tokens: How many they have together.

    Returns:
        Boolean mask, shape (entries,).
    """
    if ranks is None or ranks.size == 1:
        return among_largest(row, score, counts)
    low, high = _bracket(row, score, _reserve(counts, own_tokens, all_tokens), ranks)
    sure = score > high[row]
    vacancies = counts - ranks.all_reduce(torch.bincount(row[sure], minlength=len(counts)))
    in_question = ((score >= low[row]) & ~sure).nonzero().squeeze(1)
    row, score = row[in_question], score[in_question]
    sent = among_largest(row, score, vacancies)
    # In float64, row numbers and float32 scores are exact and travel together.
    everyones = ranks.all_gather(torch.stack([row.double(), score.double()], 1)[sent])
    everyone = torch.cat(everyones)
    taken = among_largest(everyone[:, 0].long(), everyone[:, 1], vacancies)
    own = taken.split([len(each) for each in everyones])[ranks.index]
    sure[in_question[sent]] = own
    return sure


def _reserve(counts: Tensor, own_tokens: int, all_tokens: int) -> Tensor:
    """Return this rank's part of some counts, in proportion to its tokens, rounded up."""
    return -(-counts * own_tokens // max(1, all_tokens))


def _bracket(row: Tensor, score: Tensor, reserved: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
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
    low, minus_high = ranks.all_reduce(torch.stack([cut, -cut]), "min")
    return low, -minus_high
