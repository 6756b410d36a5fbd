"""Entries of a tile, found by the maxima of its blocks, against looking at all of them."""

import pytest
import torch
from torch import Tensor

from lightning_sae.selection.tile import Tile

COLUMNS = [1, 33, 48, 96]  # in blocks of one, of one, of 16, of 32


def entries(columns: int) -> Tensor:
    """Rows with ties, and half of them negative."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-20, 21, (7, columns), generator=generator) / 8


def assert_marked(found: tuple[Tensor, Tensor, Tensor], rows: Tensor, mask: Tensor) -> None:
    row, column, score = found
    assert torch.equal(torch.stack([row, column], 1), mask.nonzero())
    assert torch.equal(score, rows[mask])


@pytest.mark.parametrize("columns", COLUMNS)
def test_bounds_are_reached_and_thresholds_exceeded(columns: int):
    rows = entries(columns)
    tile, bounds = Tile(rows), torch.linspace(-8, 16, 7).round() / 8
    at_least = (rows >= bounds[:, None]) & (rows > 0)
    above = (rows > bounds[:, None]) & (rows > 0)
    assert_marked(tile.at_least(bounds), rows, at_least)
    assert_marked(tile.at_least(torch.tensor(0.5)), rows, rows >= 0.5)
    assert_marked(tile.above(bounds), rows, above)
    assert torch.equal(tile.count_above(bounds), above.sum(1))
    if columns > 1:
        assert int(at_least.sum()) > int(above.sum())


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_largest_of_each_row_are_found(columns: int):
    rows = entries(columns)
    counts = torch.tensor([0, 1, 2, 3, 5, 30, 96]).clamp(max=columns)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        mask[row, rows[row].argsort(descending=True, stable=True)[:count]] = True
    assert_marked(Tile(rows).largest(counts), rows, mask & (rows > 0))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("count", [1, 5, 100])
def test_maxima_bound_the_largest(columns: int, count: int):
    rows = entries(columns)
    tile, ordered = Tile(rows), rows.sort(1, descending=True).values
    assert torch.equal(tile.maxima.amax(1), ordered[:, 0])
    some = min(count, columns)
    assert (tile.entries(some).topk(some).values[:, -1] <= ordered[:, some - 1]).all()
    whole = rows.flatten().sort(descending=True).values
    least = torch.finfo(rows.dtype).tiny
    assert tile.bound(count) <= (max(least, whole[count - 1]) if count <= len(whole) else least)
