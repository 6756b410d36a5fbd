"""Pairs that are collected a few at a time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.selection.pair_buffer import PairBuffer


@settings(deadline=None, derandomize=True)
@given(lots=st.lists(st.integers(0, 9), max_size=12), capacity=st.integers(0, 20))
def test_pairs_come_out_as_they_went_in_however_many(lots: list[int], capacity: int):
    found = PairBuffer((100, 100), capacity, torch.device("cpu"))
    for _ in range(2):
        pairs = torch.arange(3 * sum(lots)).view(3, -1)
        for lot in pairs.split(lots, dim=1) if lots else ():
            token, feature, value = lot
            found.add(token, feature, value.double())
        assert len(found) == sum(lots)
        kept = found.pairs()
        for column, expected in zip((kept.token, kept.feature, kept.value), pairs, strict=True):
            assert torch.equal(column.long(), expected)
        assert kept.value.dtype == (torch.float64 if lots else torch.float32)
        found.clear()


def test_some_take_the_place_of_all():
    found = PairBuffer((100, 100), 6, torch.device("cpu"))
    numbers = torch.arange(5)
    found.add(numbers, numbers + 1, numbers + 2.0)
    found.replace(found.pairs().select(numbers[3:]))
    found.add(numbers[:1], numbers[:1], numbers[:1].float())
    kept = found.pairs()
    assert kept.token.tolist() == [3, 4, 0]
    assert kept.feature.tolist() == [4, 5, 0]
    assert kept.value.tolist() == [5.0, 6.0, 0.0]
