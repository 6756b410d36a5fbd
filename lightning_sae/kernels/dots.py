"""Dot products of chosen rows of two tables."""

import triton
import triton.language as tl
from torch import Tensor

ENTRIES, COLUMNS = 16, 128  # of a tile


def dot_rows(left: Tensor, left_row: Tensor, right: Tensor, right_row: Tensor) -> Tensor:
    """Multiply, for each entry, a row of one table with a row of another, and add up.

    Not differentiable.

    Args:
        left: Shape (left rows, width).
        left_row: Row of each entry, int64, shape (entries,).
        right: Shape (right rows, width).
        right_row: Row of each entry, int64, shape (entries,).

    Returns:
        Shape (entries,), the dtype of `left`; accumulated in float32.
    """
    entries, width = len(left_row), left.shape[1]
    out = left.new_empty(entries)
    _dot_rows[(triton.cdiv(entries, ENTRIES),)](
        left.contiguous(),
        left_row.contiguous(),
        right.contiguous(),
        right_row.contiguous(),
        out,
        entries,
        width,
        ENTRIES,
        COLUMNS,
    )
    return out


@triton.jit(do_not_specialize=["entries"])  # differs from call to call
def _dot_rows(
    left: tl.tensor,
    left_row: tl.tensor,
    right: tl.tensor,
    right_row: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    tile_entries: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * tile_entries + tl.arange(0, tile_entries)
    real = entry < entries
    from_left = tl.load(left_row + entry, mask=real, other=0) * width
    from_right = tl.load(right_row + entry, mask=real, other=0) * width
    products = tl.zeros((tile_entries, tile_columns), tl.float32)
    for start in range(0, width, tile_columns):
        column = start + tl.arange(0, tile_columns)
        mask = real[:, None] & (column < width)[None, :]
        one = tl.load(left + from_left[:, None] + column[None, :], mask=mask, other=0.0)
        other = tl.load(right + from_right[:, None] + column[None, :], mask=mask, other=0.0)
        products += one.to(tl.float32) * other.to(tl.float32)
    tl.store(out + entry, tl.sum(products, axis=1), mask=real)
