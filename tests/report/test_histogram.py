"""Histograms whose bins widen as they must, against one made when all values are known."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sae.report.histogram import BINS, ValueHistograms

FEATURES = 3
VALUES = st.floats(2.0**-20, 2.0**20, width=32)
BATCH = st.lists(st.tuples(st.integers(0, FEATURES - 1), VALUES), max_size=8)


def slow(values: list[float]) -> tuple[float, list[int]]:
    """Return the width of bins that a power of two above the largest value makes, and counts."""
    _, exponent = math.frexp(max(values))  # value < 2 ** exponent
    width = 2.0**exponent / BINS
    counts = [0] * BINS
    for value in values:
        counts[math.floor(value / width)] += 1
    return width, counts


@given(st.lists(BATCH, max_size=5))
def test_it_is_that_of_all_values_at_once(batches: list[list[tuple[int, float]]]):
    histograms = ValueHistograms(FEATURES)
    for batch in batches:
        features, values = [f for f, _ in batch], [v for _, v in batch]
        histograms.update(torch.tensor(features, dtype=torch.int64), torch.tensor(values))
    for feature in range(FEATURES):
        values = [v for batch in batches for f, v in batch if f == feature]
        if values:
            width, counts = slow(values)
            assert histograms.widths()[feature] == width
            assert histograms.counts[feature].tolist() == counts
        else:
            assert histograms.counts[feature].sum() == 0
