"""The largest entries of rows, or the largest of pairs that were found; of equal ones the first."""

import torch
from torch import Tensor

from lightning_sae.matches import Matches


def kth_largest(rows: Tensor, counts: Tensor) -> Tensor:
    """Return the `counts[i]`-th largest entry of each row i, +inf where the count is zero.

    Rows are handled in groups whose counts share a power of two, so that a few rows with a large
    count do not make every row pay for a long partial sort.

    Args:
        rows: Scores, shape (rows, columns).
        counts: int64, shape (rows,), from 0 to columns.

    Returns:
        Shape (rows,), the dtype of `rows`.
    """
    kth = rows.new_full((rows.shape[0],), torch.inf)
    # 0 for a count of 0, 1 for 1, 2 for 2..3; exact in float32 for the first 24 bits of a count
    magnitude = torch.frexp(counts.float()).exponent
    for group in magnitude.unique().tolist():
        if group == 0:
            continue
        members = (magnitude == group).nonzero().squeeze(1)
        wanted = counts[members]
        selected = rows if len(members) == len(rows) else rows[members]
        top = selected.topk(int(wanted.max()), dim=1).values  # (members, largest count)
        kth[members] = top.gather(1, wanted.unsqueeze(1) - 1).squeeze(1)
    return kth


def among_largest(row: Tensor, score: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts[i]` largest entries of each row i; of equal ones the first come first.

    Args:
        row: Row of each entry, int64, shape (entries,).
        score: Positive, shape (entries,).
        counts: How many each row may take, int64, shape (rows,).

    Returns:
        Boolean mask, shape (entries,).
    """
    order, place = places(row, score)
    return torch.zeros_like(row, dtype=torch.bool).index_put((order,), place < counts[row[order]])


def places(row: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Sort entries by row, the largest first, and number them within their rows from 0.

    Args:
        row: Row of each entry, int64, shape (entries,).
        score: Positive, shape (entries,). Entries of equal score keep their order.

    Returns:
        The order that sorts them, and their numbers in that order, int64, shape (entries,).
    """
    if score.dtype == torch.float32:  # of positive ones, bits are ordered as they are: sort once
        order = ((row << 32) - score.view(torch.int32)).argsort(stable=True)
    else:
        order = score.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
    row = row[order]
    return order, torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)


def largest_pairs(pairs: Matches, count: int) -> Matches:
    """Return the `count` pairs of largest value; of equal ones those of the first tokens.

    Args:
        pairs: Sorted by feature, then by token.
        count: From 0; all are returned if there are fewer.

    Returns:
        Pairs in the order they were in.
    """
    return pairs.select(among_largest_pairs(pairs.token, pairs.value, count))


def among_largest_pairs(token: Tensor, score: Tensor, count: int) -> Tensor:
    """Mark the `count` pairs of largest score, bool, (pairs,): those of `largest_pairs`.

    Args:
        token: Of each pair, int64, shape (pairs,), of pairs that are sorted as these are.
        score: Of each pair, shape (pairs,).
        count: From 0.
    """
    if count == 0 or count >= len(token):
        return token.new_ones(len(token), dtype=torch.bool) & (count > 0)
    cut = score.topk(count).values[-1]
    chosen = score >= cut
    surplus = int(chosen.sum()) - count
    if surplus:  # equal ones: drop the last
        tied = (score == cut).nonzero().squeeze(1)
        chosen[tied[token[tied].argsort(stable=True)[-surplus:]]] = False
    return chosen


def largest_pairs_of_each_token(pairs: Matches, count: int) -> Matches:
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
