"""Pick the largest entries of each row: the one mechanism behind every choice.

Tokens are rows for token choice, features are rows for feature choice, and mutual choice has a
single row that holds the whole batch.
"""

import torch
from torch import Tensor

_BLOCK = 32  # entries; with larger blocks more entries pass the bound, with smaller ones it is dear


def largest_positive(rows: Tensor, counts: Tensor) -> Tensor:
    """Mark, in each row, its `counts` largest entries, as far as they are positive.

    Entries of equal value are taken from left to right, so the result is unique.

    Args:
        rows: Scores, shape (rows, columns).
        counts: How many entries each row may take, int64, shape (rows,), from 0 to columns.

    Returns:
        Boolean mask of the shape of `rows`.
    """
    cut = kth_largest(rows, counts).unsqueeze(1)  # (rows, 1)
    chosen = rows >= cut
    if bool((cut <= 0).any()):
        chosen &= rows > 0
    if bool((chosen.sum(1, dtype=torch.int32) > counts).any()):
        tied = chosen & (rows == cut)
        above = chosen & ~tied
        vacancies = counts.unsqueeze(1) - above.sum(1, keepdim=True)  # (rows, 1)
        chosen = above | (tied & (tied.cumsum(1) <= vacancies))
    return chosen


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
        if len(selected) == 1:
            selected = _candidates(selected[0], int(wanted)).unsqueeze(0)
        top = selected.topk(int(wanted.max()), dim=1).values  # (members, largest count)
        kth[members] = top.gather(1, wanted.unsqueeze(1) - 1).squeeze(1)
    return kth


def _candidates(row: Tensor, count: int) -> Tensor:
    """Return a small part of a long row that is sure to hold its `count` largest entries.

    That many blocks of the row have a maximum at or above the `count`-th largest block maximum, so
    the entry sought is not below it.
    """
    blocks = row[: len(row) // _BLOCK * _BLOCK].view(-1, _BLOCK).amax(1)
    if len(blocks) < count:
        return row
    return row[row >= blocks.topk(count).values[-1]]
