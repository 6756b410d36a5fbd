"""Feature choice against a brute force that sorts all pairs."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import (
    TensorScores,
    feature_choice,
    feature_choice_counting,
    mutual_choice,
)
from lightning_sae.selection import scores
from tests.allocation.brute_force import (
    AWKWARD,
    PAIRS,
    SIZES,
    affinities,
    awkward,
    by_feature,
    check,
    thorough,
)


@thorough
@given(affinities(), st.data())
def test_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    tokens, features = affinity.shape
    budgets = data.draw(st.lists(st.integers(0, tokens), min_size=features, max_size=features))
    check(feature_choice(affinity, torch.tensor(budgets)), by_feature(affinity, budgets))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", AWKWARD)
def test_is_the_brute_force_from_tiles(case: str, size: tuple[int, int], pairs: int):
    generator = torch.Generator().manual_seed(3)
    tokens, features = size
    affinity = awkward(case, size)
    budgets = torch.randint(0, tokens + 1, (features,), generator=generator) // torch.randint(
        1, 40, (features,), generator=generator
    )
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=24):
        found = feature_choice(TensorScores(affinity), budgets)
    check(found, by_feature(affinity, budgets.tolist()))


@pytest.mark.parametrize("pairs", [500, 10**6])  # in a tile
def test_tokens_above_thresholds_are_counted_on_the_way(pairs: int):
    affinity = torch.randn(64, 50, generator=torch.Generator().manual_seed(4))
    thresholds = torch.linspace(-1, 2, 50)
    thresholds[7] = affinity[3, 7]  # not above itself
    thresholds[8] = torch.nan
    budgets = torch.arange(50) % 4
    with patch.object(scores, "_PAIRS", pairs):
        matches, passing = feature_choice_counting(affinity, budgets, thresholds)
    assert torch.equal(passing, ((affinity > thresholds) & (affinity > 0)).sum(0))
    check(matches, by_feature(affinity, budgets.tolist()))


def test_is_mutual_choice_for_one_feature():
    column = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    expected = mutual_choice(column, 7).to_dense()
    assert torch.equal(feature_choice(column, torch.tensor([7])).to_dense(), expected)


def test_large_batches_spend_exactly_their_budgets():
    generator = torch.Generator().manual_seed(1)
    affinity = torch.randn(300, 400, generator=generator).abs()
    budgets = torch.randint(0, 300, (400,), generator=generator)
    assert torch.equal(feature_choice(affinity, budgets).per_feature(), budgets)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_affinities_must_be_finite(value: float):
    affinity = torch.rand(32, 64)
    affinity[20, 30] = value
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        feature_choice(affinity, torch.ones(64, dtype=torch.int64))


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([1, 1], "budgets must be 3 integers"),
        ([1.0, 1.0, 1.0], "budgets must be 3 integers"),
        ([0, 1, 3], "budgets from 0 to 3 are out of range: the batch has 2 tokens$"),
        ([0, -1, 2], "budgets from -1 to 2"),
    ],
)
def test_impossible_budgets_are_explained(budgets: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        feature_choice(torch.zeros(2, 3), torch.tensor(budgets))


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_impossible_thresholds_are_explained(shape: tuple[int, ...]):
    budgets = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="thresholds must be 3 numbers, one a feature"):
        feature_choice_counting(torch.zeros(2, 3), budgets, torch.zeros(shape))
