"""A tile of scores, in which large entries are found without looking at most of the others."""

import math
from functools import cached_property

import torch
from torch import Tensor

from lightning_sae.numerics import just_above
from lightning_sae.selection.ranking import among_largest, kth_largest

BLOCK = 32  # entries; with larger blocks more entries pass a bound, with smaller ones it is dear


class Tile:
    """Rows of scores, each cut into blocks whose maxima are known.

    A block whose maximum is below a bound has no entry at or above it. And since each block maximum
    is an entry, the k-th largest of them is a lower bound of the k-th largest entry.

    Args:
        rows: Scores, contiguous, shape (rows, columns).

    Attributes:
        maxima: Of each row's blocks, shape (rows, blocks).
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._size = math.gcd(rows.shape[1], BLOCK)
        self._blocks = rows.view(len(rows), rows.shape[1] // self._size, self._size)
        self.maxima = self._blocks.amax(2) if self._size > 1 else rows

    def at_least(self, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries that are positive and at least the bounds of their rows.

        Args:
            bounds: Shape (rows,), or 0-d for one that holds for all.

        Returns:
            Row, column and score of each, shape (entries,), by row and then by column.
        """
        bounds = bounds.clamp_min(self._least).expand(len(self.rows))
        row, block = (self.maxima >= bounds.unsqueeze(1)).nonzero(as_tuple=True)
        picked = self._pick(row, block)
        each, place = (picked >= bounds[row].unsqueeze(1)).nonzero(as_tuple=True)
        return row[each], block[each] * self._size + place, picked[each, place]

    def above(self, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries that are positive and above the thresholds (rows,) of their rows."""
        return self.at_least(just_above(thresholds.to(self.rows.dtype)))

    def count_above(self, thresholds: Tensor) -> Tensor:
        """Return how many entries of each row are positive and above its threshold, int64."""
        bounds = just_above(thresholds.to(self.rows.dtype)).clamp_min(self._least)
        row, block = (self.maxima >= bounds.unsqueeze(1)).nonzero(as_tuple=True)
        counts = (self._pick(row, block) >= bounds[row].unsqueeze(1)).sum(1)
        return counts.new_zeros(len(self.rows)).index_add_(0, row, counts)

    def largest(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest positive entries of each row; of equal ones those to the left.

        Args:
            counts: How many entries each row may take, int64, shape (rows,), 0 to columns.

        Returns:
            Row, column and score of each, shape (entries,), by row and then by column.
        """
        row, column, score = self.at_least(self._bounds(counts))
        surplus = torch.bincount(row, minlength=len(counts)) > counts
        crowded = surplus[row].nonzero().squeeze(1)
        chosen = torch.ones_like(row, dtype=torch.bool)
        chosen[crowded] = among_largest(row[crowded], score[crowded], counts)
        kept = chosen.nonzero().squeeze(1)
        return row[kept], column[kept], score[kept]

    def entries(self, count: int) -> Tensor:
        """Return entries of each row whose `count`-th largest is a good bound of that of all.

        Returns:
            Block maxima, shape (rows, blocks), or all, if there are hardly more blocks than that.
        """
        return self.maxima if count <= self.maxima.shape[1] * 3 // 4 else self.rows

    def bound(self, count: int) -> Tensor:
        """Return a lower bound, 0-d, of the `count`-th largest entry of all rows together."""
        if count > self.maxima.numel():
            return self._least
        return self.maxima.flatten().topk(count).values[-1]

    def _bounds(self, counts: Tensor) -> Tensor:
        """Return a lower bound, (rows,), of each row's `counts[i]`-th largest entry."""
        blocks = self.maxima.shape[1]
        bounds = kth_largest(self.maxima, counts.clamp(max=blocks))
        # With hardly more blocks than entries wanted the bound lets too much through.
        many = (counts > blocks * 3 // 4).nonzero().squeeze(1) if self._size > 1 else counts[:0]
        if len(many):
            bounds[many] = kth_largest(self.rows[many], counts[many])
        return bounds

    def _pick(self, row: Tensor, block: Tensor) -> Tensor:
        flat = self._blocks.view(-1, self._size)
        return flat.index_select(0, row * self.maxima.shape[1] + block)  # (picked, size)

    @cached_property
    def _least(self) -> Tensor:
        """The smallest number that counts as positive: below it arithmetic may round to zero."""
        return self.rows.new_tensor(torch.finfo(self.rows.dtype).tiny)
