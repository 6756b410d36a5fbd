"""The largest rows of each feature, against a sorted list of all that were offered."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sae.report.largest import Largest

FEATURES, N, WIDTH = 3, 2, 2
OFFER = st.tuples(st.integers(0, FEATURES - 1), st.integers(0, 4))
BATCHES = st.lists(st.lists(OFFER, max_size=9), max_size=4)


@given(BATCHES)
def test_they_are_the_largest_of_all_and_of_equal_ones_the_earliest(batches):
    largest, offered = Largest(FEATURES, N, WIDTH), []
    for batch in batches:
        first = len(offered)
        offered += batch
        places = torch.arange(first, len(offered))
        rows = torch.stack([places, -places], dim=1).float()
        feature = torch.tensor([f for f, _ in batch], dtype=torch.int64)
        key = torch.tensor([float(k) for _, k in batch])
        largest.offer(feature, key, places, lambda chosen, rows=rows: rows[chosen])
    found, found_rows = largest.by_key()
    for feature in range(FEATURES):
        mine = [(-key, place) for place, (f, key) in enumerate(offered) if f == feature]
        best = sorted(mine)[:N]
        places = [place for _, place in best]
        empty = N - len(best)
        assert found[feature].tolist() == places + [-1] * empty
        keys = largest.key[feature].sort(descending=True).values.tolist()
        assert keys == [-key for key, _ in best] + [-torch.inf] * empty
        assert found_rows[feature, : len(best), 1].tolist() == [-place for place in places]
