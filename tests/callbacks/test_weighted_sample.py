"""Rows drawn from a stream: with the odds of their weights, none twice, alike on every rank."""

from collections import Counter
from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.callbacks.weighted_sample import WeightedSample
from lightning_sae.parallel import Ranks
from tests.helpers.ddp import run_on_two

WIDTH = 8


def draw(weights: torch.Tensor, size: int, seed: int, parts: int = 2) -> list[int]:
    """Draw from rows that hold their own number."""
    sample = WeightedSample()
    rows = torch.arange(len(weights)).float().unsqueeze(1)
    for part, chunk in enumerate(torch.arange(len(weights)).chunk(parts)):
        sample.add(rows[chunk], weights[chunk], size=size, seed=parts * seed + part, ranks=Ranks())
    return sample.rows.squeeze(1).int().tolist()


def test_no_rows_change_nothing():
    sample = WeightedSample()
    for count in (0, 3, 0):
        rows = torch.ones(count, 2)
        sample.add(rows, rows[:, 0], size=5, seed=count, ranks=Ranks())
    assert sample.rows.shape == (3, 2)


def test_rows_are_drawn_as_if_one_after_the_other():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    draws = 2000
    seen = Counter(tuple(draw(weights, 2, seed)) for seed in range(draws))
    for first, second in permutations(range(4), 2):
        odds = weights[first] / 10 * weights[second] / (10 - weights[first])
        spread = (odds * (1 - odds) / draws).sqrt()
        assert abs(seen[first, second] / draws - odds) < 4 * spread


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1e30]), min_size=1, max_size=12),
    st.integers(1, 15),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_no_row_is_drawn_twice_and_none_of_weight_zero(weights, size, parts, seed):
    drawn = draw(torch.tensor(weights, dtype=torch.float64), size, seed, parts)
    assert len(set(drawn)) == len(drawn)
    assert all(weights[row] > 0 for row in drawn)
    assert len(drawn) == min(size, sum(weight > 0 for weight in weights))


def draw_on(rank: int, splits: list[list[int]]) -> torch.Tensor:
    """Draw from a rank's share of three times 32 rows."""
    sample = WeightedSample()
    x = torch.randn(3, 32, WIDTH, generator=torch.Generator().manual_seed(0))
    for seed, split in enumerate(splits):
        share = x[seed].split(split)[rank]
        sample.add(share, share.square().sum(1), size=20, seed=seed, ranks=Ranks())
    return sample.rows


def test_two_ranks_draw_what_one_does():
    one = draw_on(0, [[32]] * 3)
    first, second = run_on_two(draw_on, [[16, 16]] * 3)
    assert torch.equal(first, one)
    assert torch.equal(second, one)
    first, second = run_on_two(draw_on, [[16, 16], [20, 12], [9, 23]])  # uneven ranks agree too
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 20
