"""Pick the largest entries of each row: the one mechanism behind every choice.

Tokens are rows for token choice, features are rows for feature choice, and mutual choice has a
single row that holds the whole batch.
"""

import torch
from torch import Tensor


def largest_positive(rows: Tensor, counts: Tensor) -> Tensor:
    """Mark, in each row, its `counts` largest entries, as far as they are positive.

    Entries of equal value are taken from left to right, so the result is unique.

    Args:
        rows: Scores, shape (rows, columns).
        counts: How many entries each row may take, int64, shape (rows,), from 0 to columns.

    Returns:
        Boolean mask of the shape of `rows`.
    """
    cut = kth_largest(rows, counts).clamp_min(0).unsqueeze(1)  # (rows, 1); +inf where count is 0
    chosen = rows > cut
    tied = (rows == cut) & (cut > 0)
    if int(tied.sum()) > int((tied.any(1)).sum()):  # some row has more than one entry at its cut
        vacancies = counts.unsqueeze(1) - chosen.sum(1, keepdim=True)  # (rows, 1)
        tied &= tied.cumsum(1) <= vacancies
    return chosen | tied


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
    magnitude = torch.frexp(counts.double()).exponent  # 0 for a count of 0, 1 for 1, 2 for 2..3
    for group in magnitude.unique().tolist():
        if group == 0:
            continue
        members = (magnitude == group).nonzero().squeeze(1)
        wanted = counts[members]
        selected = rows if len(members) == len(rows) else rows[members]
        top = selected.topk(int(wanted.max()), dim=1).values  # (members, largest count)
        kth[members] = top.gather(1, wanted.unsqueeze(1) - 1).squeeze(1)
    return kth
