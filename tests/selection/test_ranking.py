"""The largest of rows and of pairs against sorting them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection import among_largest, largest_pairs, places
from lightning_sae.selection.ranking import kth_largest, largest_pairs_of_each_token

exact = settings(deadline=None, derandomize=True)


@st.composite
def rows_and_scores(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows of entries, 0 to 3, and their scores, many of them equal."""
    drawn = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=20))
    row, score = (torch.tensor([each[i] for each in drawn], dtype=torch.int64) for i in (0, 1))
    return row, score.to(draw(st.sampled_from([torch.float32, torch.float64]))) / 3


def sorted_slowly(row: Tensor, score: Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (int(row[i]), -float(score[i]), i))


@exact
@given(rows_and_scores())
def test_places_are_those_of_sorted_entries(entries: tuple[Tensor, Tensor]):
    order, place = places(*entries)
    expected = sorted_slowly(*entries)
    assert order.tolist() == expected
    in_row = entries[0][order].tolist()
    assert place.tolist() == [in_row[:i].count(row) for i, row in enumerate(in_row)]


@exact
@given(rows_and_scores(), st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_the_largest_of_rows_are_marked(entries: tuple[Tensor, Tensor], counts: list[int]):
    row, score = entries
    left, expected = list(counts), [False] * len(row)
    for i in sorted_slowly(row, score):
        expected[i] = left[row[i]] > 0
        left[row[i]] -= 1
    assert among_largest(row, score, torch.tensor(counts)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_is_that_of_sorted_rows(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 40, generator=generator, dtype=dtype)
    counts = torch.tensor([0, 1, 2, 3, 4, 7, 8, 39, 40])
    ordered = rows.sort(1, descending=True).values
    expected = ordered.gather(1, (counts - 1).clamp_min(0)[:, None]).squeeze(1)
    assert torch.equal(kth_largest(rows, counts), expected.masked_fill(counts == 0, torch.inf))


def pairs_of(row: Tensor, score: Tensor) -> Matches:
    """One feature after another, each with the tokens of its entries."""
    order = row.argsort(stable=True)
    feature = row[order]
    token = torch.arange(len(row)) - torch.searchsorted(feature, feature)
    return Matches(token, feature, score[order], (20, 4))


@exact
@given(rows_and_scores(), st.integers(0, 22))
def test_of_equal_pairs_the_first_tokens_are_kept(entries: tuple[Tensor, Tensor], count: int):
    pairs = pairs_of(*entries)
    kept = largest_pairs(pairs, count)
    order = sorted(
        range(len(pairs)),
        key=lambda i: (-float(pairs.value[i]), int(pairs.token[i]), int(pairs.feature[i])),
    )
    expected = pairs.select(torch.tensor(sorted(order[:count]), dtype=torch.int64))
    for column in ("token", "feature", "value"):
        assert torch.equal(getattr(kept, column), getattr(expected, column))


@exact
@given(rows_and_scores(), st.integers(0, 4))
def test_of_equal_pairs_of_a_token_the_first_features_are_kept(
    entries: tuple[Tensor, Tensor], count: int
):
    pairs = pairs_of(*entries)
    kept = largest_pairs_of_each_token(pairs, count)
    expected = []
    for token in range(20):
        mine = [
            (-float(v), int(f))
            for t, f, v in zip(pairs.token, pairs.feature, pairs.value, strict=True)
            if t == token
        ]
        expected += sorted((token, f, -v) for v, f in sorted(mine)[:count])
    columns = (kept.token.tolist(), kept.feature.tolist(), kept.value.tolist())
    assert list(zip(*columns, strict=True)) == expected
