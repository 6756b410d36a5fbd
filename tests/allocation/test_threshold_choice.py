"""Choices by thresholds, and the thresholds that stand for a feature choice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import (
    RankDiscount,
    feature_choice,
    midpoint_thresholds,
    scaled_thresholds,
    threshold_choice,
)
from tests.allocation.brute_force import (
    AWKWARD,
    affinities,
    awkward,
    check,
    midpoints,
    thorough,
)
from tests.helpers.searches import both


@thorough
@given(affinities(), st.floats(-1, 2, width=16))
def test_looks_at_each_pair_alone(affinity: Tensor, threshold: float):
    expected = torch.where((affinity > threshold) & (affinity > 0), affinity, 0.0)
    check(threshold_choice(affinity, threshold), expected)
    per_feature = torch.full((affinity.shape[1],), threshold)
    check(threshold_choice(affinity, per_feature), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_affinities_must_be_finite(value: float):
    affinity = torch.rand(32, 64)
    affinity[20, 30] = value
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        threshold_choice(affinity, 0.1)


@thorough
@given(affinities(), st.data())
def test_midpoints_are_those_of_all_scores(affinity: Tensor, data: st.DataObject):
    tokens, features = affinity.shape
    drawn = data.draw(st.lists(st.integers(0, tokens), min_size=features, max_size=features))
    budgets = torch.tensor(drawn)
    expected = midpoints(affinity, feature_choice(affinity, budgets))
    assert torch.equal(midpoint_thresholds(affinity, budgets), expected)


def test_midpoint_lies_between_the_last_chosen_and_the_first_rejected():
    generator = torch.Generator().manual_seed(2)
    affinity = torch.randn(40, 7, generator=generator).abs()
    budgets = torch.tensor([1, 2, 3, 10, 39, 40, 0])
    found = midpoint_thresholds(affinity, budgets)
    ordered = affinity.sort(0, descending=True).values
    for i, m in enumerate(budgets.tolist()):
        last = ordered[m - 1, i] if m > 0 else ordered[0, i]
        first = ordered[m, i] if m < 40 else ordered[-1, i]
        torch.testing.assert_close(found[i], (last + first) / 2)


def test_midpoint_is_never_negative():
    affinity = torch.tensor([[2.0, -1.0], [-3.0, -2.0]])
    found = midpoint_thresholds(affinity, torch.tensor([2, 2]))
    assert torch.equal(found, torch.tensor([1.0, 0.0]))


def test_midpoints_are_as_wide_as_scores():
    affinity = torch.rand(4, 3)
    budgets = torch.ones(3, dtype=torch.int64)
    assert midpoint_thresholds(affinity.bfloat16(), budgets).dtype == torch.float32
    assert midpoint_thresholds(affinity.double(), budgets).dtype == torch.float64


@pytest.mark.parametrize("budgets", [[0, -1, 2], [0, 1, 3]])
def test_impossible_budgets_are_explained(budgets: list[int]):
    with pytest.raises(ValueError, match=r"budgets from -?\d to \d are out of range"):
        midpoint_thresholds(torch.zeros(2, 3), torch.tensor(budgets))


@thorough
@given(affinities(), st.data())
def test_scaled_thresholds_let_as_many_pairs_through_as_the_budget(
    affinity: Tensor, data: st.DataObject
):
    tokens, features = affinity.shape
    drawn = st.lists(st.floats(0.125, 8, width=16), min_size=features, max_size=features)
    thresholds = torch.tensor(data.draw(drawn))
    budget = data.draw(st.integers(0, tokens * features))
    found = scaled_thresholds(affinity, thresholds, budget)
    factor = found / thresholds
    torch.testing.assert_close(factor, factor[:1].expand(features))
    multiples = (affinity / thresholds).flatten().sort(descending=True).values
    multiples = torch.cat([multiples.clamp_min(0), torch.zeros(1)])
    # Of equal multiples at the cut none is let through, or rounding lets some: unless they differ.
    allowed = (multiples > multiples[budget] * (1 + 1e-5)).sum().item()
    most = (multiples > multiples[budget] * (1 - 1e-5)).sum().item()
    count = len(threshold_choice(affinity, found))
    assert allowed <= count <= max(allowed, min(most, budget))


@pytest.mark.parametrize("first_guess", [1e-6, 1.0, 1e6])
def test_scaled_thresholds_are_found_wherever_they_were(first_guess: float):
    affinity = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    thresholds = first_guess * torch.rand(40, generator=torch.Generator().manual_seed(1)).add(0.5)
    found = scaled_thresholds(affinity, thresholds, 900)
    assert len(threshold_choice(affinity, found)) == 900
    everything = scaled_thresholds(affinity, thresholds, 300 * 40)
    assert len(threshold_choice(affinity, everything)) == (affinity > 0).sum()


@pytest.mark.parametrize("expected", [1, 100, 10**6])  # too little room, enough, for all pairs
@pytest.mark.parametrize("discount", [None, RankDiscount(2)])
@pytest.mark.parametrize("case", AWKWARD)
def test_what_is_expected_has_no_influence(case: str, discount: RankDiscount | None, expected: int):
    affinity = awkward(case, (40, 33))
    thresholds = torch.linspace(-1, 2, 33)
    thresholds[5] = torch.nan  # nothing is above
    searched, other = both(affinity)
    one = threshold_choice(searched, thresholds, discount=discount, expected=expected)
    other = threshold_choice(other, thresholds, discount=discount)
    for column in ("token", "feature", "value"):
        assert torch.equal(getattr(one, column), getattr(other, column))
    one = threshold_choice(searched, 0.3, discount=discount, expected=expected)
    assert torch.equal(one.value, threshold_choice(affinity, 0.3, discount=discount).value)
