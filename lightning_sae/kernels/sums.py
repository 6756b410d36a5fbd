"""Weighted sums of a table's rows, one for each bag of entries."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sae.kernels.dots import dot_rows

ENTRIES, COLUMNS = 16, 128  # of a tile
PIECE = 512  # entries that one program reads, one tile after the other


def sum_rows(table: Tensor, bag: Tensor, row: Tensor, weight: Tensor, bags: int) -> Tensor:
    """Add up, for each bag, the rows of a table that fall into it, times their weights.

    The twin of `lightning_sae.sparse.rows.sum_rows`, accumulated in float32. No atomics: equal
    calls give equal bits.
    """
    return _SumRows.apply(table.detach(), bag, row, weight, bags)  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, bag: Tensor, row: Tensor, weight: Tensor, bags: int
    ) -> Tensor:
        ctx.save_for_backward(table, bag, row)
        starts = torch.searchsorted(bag, torch.arange(bags + 1, device=bag.device))
        return sum_segments(table, row, weight, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, bag, row = ctx.saved_tensors
        return None, None, None, dot_rows(grad, bag, table, row), None


def sum_segments(table: Tensor, row: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """Do as `sum_rows`, where it is known at which entry each bag starts. Not differentiable.

    Args:
        table: Shape (rows, width).
        row: Row of each entry, int64, shape (entries,).
        weight: Shape (entries,).
        starts: First entry of each bag, and the number of entries, int64, shape (bags + 1,).

    Returns:
        Shape (bags, width), the dtype of the table.
    """
    first, last = starts[:-1].contiguous(), starts[1:].contiguous()
    bags = len(first)
    out = table.new_empty(bags, table.shape[1])
    if len(row) <= PIECE:
        _launch(table, row, weight, first, last, out)
        return out
    # A feature may fire on half the tokens. What its bag has beyond one piece is summed piece
    # by piece, side by side with all others, before the bags are. As many pieces as there can
    # be at most are launched, unneeded ones empty: to know their number is to wait for the GPU.
    further = (last - first - 1).clamp(min=0) // PIECE
    piece_last = further.cumsum(0)
    piece_first = piece_last - further
    piece = torch.arange(len(row) // PIECE, device=row.device)
    owner = torch.searchsorted(piece_last, piece, right=True).clamp(max=bags - 1)
    start = first[owner] + (1 + piece - piece_first[owner]) * PIECE
    sums = table.new_empty(len(piece), table.shape[1], dtype=torch.float32)
    _launch(table, row, weight, start, (start + PIECE).minimum(last[owner]), sums)
    first_piece = last.minimum(first + PIECE)
    _launch(table, row, weight, first, first_piece, out, sums, piece_first, piece_last)
    return out


def _launch(
    table: Tensor,
    row: Tensor,
    weight: Tensor,
    first: Tensor,
    last: Tensor,
    out: Tensor,
    *further: Tensor,
) -> None:
    segments, width = out.shape
    _sum_rows[(segments, triton.cdiv(width, COLUMNS))](
        table.contiguous(),
        row.contiguous(),
        weight.contiguous(),
        first,
        last,
        *(further or (None, None, None)),
        out,
        width,
        ENTRIES,
        COLUMNS,
    )


@triton.jit
def _sum_rows(
    table: tl.tensor,
    row: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    sums: tl.tensor,
    sums_first: tl.tensor,
    sums_last: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    tile_entries: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    segment = tl.program_id(0).to(tl.int64)  # times the width, it may exceed int32
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    inside = column < width
    products = tl.zeros((tile_entries, tile_columns), tl.float32)
    stop = tl.load(last + segment)
    for start in range(tl.load(first + segment), stop, tile_entries):
        entry = start + tl.arange(0, tile_entries)
        real = entry < stop
        from_row = tl.load(row + entry, mask=real, other=0) * width
        rows = tl.load(
            table + from_row[:, None] + column[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        scale = tl.load(weight + entry, mask=real, other=0.0)
        products += rows.to(tl.float32) * scale.to(tl.float32)[:, None]
    total = tl.sum(products, axis=0)
    if sums is not None:
        for index in range(tl.load(sums_first + segment), tl.load(sums_last + segment)):
            total += tl.load(sums + index * width + column, mask=inside, other=0.0)
    tl.store(out + segment * width + column, total, mask=inside)
