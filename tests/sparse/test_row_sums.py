"""Sums of rows for each feature against dense products."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lightning_sae.allocation import mutual_choice
from lightning_sae.sparse.row_sums import RowSums

FEATURES, WIDTH = 7, 3


@settings(deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_merged_sums_are_those_of_their_matrices(sizes: list[tuple[int, int]], seed: int):
    torch.manual_seed(seed)
    along = torch.randn(FEATURES, WIDTH, dtype=torch.float64)
    parts, expected = [], torch.zeros_like(along)
    for tokens, budget in sizes:
        affinities = torch.randn(tokens, FEATURES, dtype=torch.float64).abs()
        matches = mutual_choice(affinities, min(budget, tokens * FEATURES))
        table = torch.randn(tokens, WIDTH, dtype=torch.float64)
        parts.append(RowSums.of(table, matches.value, matches, along))
        expected += matches.to_dense().T @ table
    direction = functional.normalize(along, dim=1)
    expected -= (expected * direction).sum(1, keepdim=True) * direction
    total = RowSums.merged(parts)
    torch.testing.assert_close(total.dense(), expected)
    torch.testing.assert_close(total.rows(slice(2, 5)), expected[2:5])
