"""What decoding and the gradients of matches have in common: weighted sums of a table's rows."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from lightning_sae.kernels import with_kernel
from lightning_sae.matches import Matches
from lightning_sae.numerics import wide

DENSE_ABOVE = 1 / 16  # share of pairs that match: where gathers and a GEMM cost the same on a CPU

_ENTRIES = 512  # whose rows are copied at a time: few enough to stay in a cache


def is_dense(matches: Matches) -> bool:
    """Return whether so many pairs match that dense products are cheaper than gathers."""
    tokens, features = matches.shape
    return len(matches) > DENSE_ABOVE * tokens * features


@with_kernel
def sum_rows(table: Tensor, bag: Tensor, row: Tensor, weight: Tensor, bags: int) -> Tensor:
    """Add up, for each bag, the rows of a table that fall into it, times their weights.

    Reads one row for every entry and writes one for every bag. Differentiable in the weights
    alone, at the same cost.

    Args:
        table: Shape (rows, width). Treated as constant.
        bag: Bag of each entry, int64, ascending, shape (entries,).
        row: Row of each entry, int64, shape (entries,).
        weight: Shape (entries,), the dtype of the table.
        bags: Number of bags.

    Returns:
        Shape (bags, width); zero for a bag without entries.

    Example:
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> bag, row = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
        >>> sum_rows(table, bag, row, torch.tensor([1.0, 2.0, 3.0]), bags=3)
        tensor([[1., 2.],
                [0., 0.],
                [0., 3.]])
    """
    starts = torch.searchsorted(bag, torch.arange(bags + 1, device=bag.device))
    return sum_segments(table, row, weight, starts)


@with_kernel
def sum_segments(table: Tensor, row: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """Do as `sum_rows`, where it is known at which entry each bag starts.

    Args:
        table: Shape (rows, width). Treated as constant.
        row: Row of each entry, int64, shape (entries,).
        weight: Shape (entries,), the dtype of the table.
        starts: First entry of each bag, and the number of entries, int64, shape (bags + 1,).

    Returns:
        Shape (bags, width); zero for a bag without entries.
    """
    return functional.embedding_bag(
        row,
        table.detach(),
        starts,
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )


def widened_again(narrow: Tensor, table: Tensor) -> saved_tensors_hooks:
    """Let sums of rows keep 16-bit numbers for their backward pass, which widens them again.

    Args:
        narrow: What is kept.
        table: `wide(narrow)`, of which the sums are made.
    """
    address = table.data_ptr()
    return saved_tensors_hooks(
        lambda tensor: None if tensor.data_ptr() == address else tensor,
        lambda kept: wide(narrow.detach()) if kept is None else kept,
    )


@with_kernel
def dot_rows(left: Tensor, left_row: Tensor, right: Tensor, right_row: Tensor) -> Tensor:
    """Return the dot products of pairs of rows, no gradient.

    Args:
        left: Shape (rows, width).
        left_row: Row of `left` of each entry, int64, shape (entries,).
        right: Shape (rows, width).
        right_row: Row of `right` of each entry, int64, shape (entries,).

    Returns:
        Shape (entries,).

    Example:
        >>> left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        >>> dot_rows(left, torch.tensor([0, 0]), right, torch.tensor([0, 1]))
        tensor([11., 17.])
    """
    parts = zip(left_row.split(_ENTRIES), right_row.split(_ENTRIES), strict=True)
    # Of whole rows `index_select` makes the same copies as `left[one]`, in a quarter of the time.
    products = [
        torch.linalg.vecdot(left.index_select(0, one), right.index_select(0, other))
        for one, other in parts
    ]
    return torch.cat(products)
