"""Every choice against a brute force that sorts all pairs, on inputs made to be awkward."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import (
    Matches,
    TensorScores,
    feature_choice,
    midpoint_thresholds,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from lightning_sae.selection import scores


def brute_force(affinities: Tensor, group_of: list[list[int]], budgets: list[int]) -> Tensor:
    """Walk over the pairs from large to small; a group takes pairs until its budget is spent."""
    tokens, features = affinities.shape
    pairs = [(n, i) for n in range(tokens) for i in range(features)]
    pairs.sort(key=lambda pair: (-affinities[pair].item(), pair))
    left = list(budgets)
    dense = torch.zeros_like(affinities)
    for n, i in pairs:
        group = group_of[n][i]
        if left[group] > 0 and affinities[n, i] > 0:
            dense[n, i] = affinities[n, i]
            left[group] -= 1
    return dense


@st.composite
def affinities(draw: st.DrawFn) -> Tensor:
    tokens, features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(
        st.sampled_from(
            [
                st.integers(-2, 3),  # many ties, among them at zero
                st.floats(-3, 3, width=16),
                st.just(1),  # nothing but ties
                st.integers(-3, 0),  # nothing positive
            ]
        )
    )
    size = tokens * features
    flat = draw(st.lists(values, min_size=size, max_size=size))
    return torch.tensor(flat, dtype=torch.float32).view(tokens, features)


def check(matches: Matches, expected: Tensor) -> None:
    assert torch.equal(matches.to_dense(), expected)
    assert (matches.value > 0).all()
    order = matches.token * matches.shape[1] + matches.feature
    assert torch.equal(order, order.sort().values)
    token, feature, by_feature = matches.by_feature
    assert torch.equal(token, matches.token[by_feature])
    assert torch.equal(feature, matches.feature[by_feature])
    assert torch.equal(by_feature, (matches.feature * matches.shape[0] + matches.token).argsort())
    assert torch.equal(matches.per_token(), (expected > 0).sum(1))
    assert torch.equal(matches.per_feature(), (expected > 0).sum(0))


thorough = settings(max_examples=200, deadline=None, derandomize=True)


@thorough
@given(affinities(), st.data())
def test_token_choice_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    tokens, features = affinity.shape
    k = data.draw(st.integers(1, features))
    groups = [[n] * features for n in range(tokens)]
    check(token_choice(affinity, k), brute_force(affinity, groups, [k] * tokens))


@thorough
@given(affinities(), st.data())
def test_mutual_choice_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    tokens, features = affinity.shape
    budget = data.draw(st.integers(0, tokens * features))
    groups = [[0] * features] * tokens
    check(mutual_choice(affinity, budget), brute_force(affinity, groups, [budget]))


@thorough
@given(affinities(), st.data())
def test_feature_choice_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    tokens, features = affinity.shape
    budgets = data.draw(st.lists(st.integers(0, tokens), min_size=features, max_size=features))
    groups = [list(range(features))] * tokens
    expected = brute_force(affinity, groups, budgets)
    check(feature_choice(affinity, torch.tensor(budgets)), expected)


@thorough
@given(affinities(), st.floats(-1, 2, width=16))
def test_threshold_choice_looks_at_each_pair_alone(affinity: Tensor, threshold: float):
    expected = torch.where((affinity > threshold) & (affinity > 0), affinity, 0.0)
    check(threshold_choice(affinity, threshold), expected)
    per_feature = torch.full((affinity.shape[1],), threshold)
    check(threshold_choice(affinity, per_feature), expected)


AWKWARD = {
    "normal": lambda size, g: torch.randn(size, generator=g),
    "ties": lambda size, g: torch.randint(-3, 4, size, generator=g).float(),
    "all the same": lambda size, g: torch.ones(size),
    "few positive": lambda size, g: torch.randn(size, generator=g) - 2.5,
    "none positive": lambda size, g: -torch.rand(size, generator=g),
    "rising": lambda size, g: torch.arange(1.0, size[1] + 1).expand(size),
    "one large token": lambda size, g: torch.randn(size, generator=g) * torch.eye(size[0], 1) * 99,
    "one large feature": lambda size, g: (
        torch.randn(size, generator=g) * (1 + 99 * torch.eye(1, size[1]))
    ),
}


@pytest.mark.parametrize("pairs", [300, 2000, 10**6])  # in a tile: a few rows, many, all
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (40, 33)])  # in blocks of 32, of 8, of none
@pytest.mark.parametrize("case", AWKWARD)
def test_choices_from_tiles_are_the_brute_force(case: str, size: tuple[int, int], pairs: int):
    generator = torch.Generator().manual_seed(3)
    tokens, features = size
    affinity = AWKWARD[case](size, generator)
    budgets = torch.randint(0, tokens + 1, (features,), generator=generator) // torch.randint(
        1, 40, (features,), generator=generator
    )
    by_batch = [[0] * features] * tokens
    by_feature = [list(range(features))] * tokens
    by_token = [[n] * features for n in range(tokens)]
    lazy = TensorScores(affinity)
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=24):
        for k in (1, 5, 20, features):
            check(token_choice(affinity, k), brute_force(affinity, by_token, [k] * tokens))
        check(feature_choice(lazy, budgets), brute_force(affinity, by_feature, budgets.tolist()))
        for budget in (0, 1, 4 * tokens, tokens * features):
            expected = brute_force(affinity, by_batch, [budget])
            cut = expected[expected > 0].min().item() if (expected > 0).any() else 0.0
            for guess in (None, 0.0, 0.97 * cut, cut, 1.01 * cut, 1e30, -1.0):
                check(mutual_choice(lazy, budget, guess), expected)


def test_scores_count_what_passes_thresholds():
    affinity = torch.randn(64, 50, generator=torch.Generator().manual_seed(4))
    thresholds = torch.linspace(-1, 2, 50)
    thresholds[7] = affinity[3, 7]  # not above itself
    lazy = TensorScores(affinity)
    lazy.thresholds = thresholds
    with patch.object(scores, "_PAIRS", 500):
        feature_choice(lazy, torch.ones(50, dtype=torch.int64))
    assert torch.equal(lazy.passing, ((affinity > thresholds) & (affinity > 0)).sum(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "choose",
    [
        lambda a: token_choice(a, 1),
        lambda a: mutual_choice(a, 5),
        lambda a: mutual_choice(a, 5, guess=0.5),
        lambda a: feature_choice(a, torch.ones(64, dtype=torch.int64)),
        lambda a: threshold_choice(a, 0.1),
    ],
)
def test_affinities_must_be_finite(choose, value: float):
    affinity = torch.rand(32, 64)
    affinity[20, 30] = value
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        choose(affinity)


def test_rules_meet_where_they_must():
    affinity = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 50):
        assert torch.equal(
            token_choice(affinity, k).to_dense(), mutual_choice(affinity, k).to_dense()
        )
    column = affinity.T.contiguous()
    expected = mutual_choice(column, 7).to_dense()
    assert torch.equal(feature_choice(column, torch.tensor([7])).to_dense(), expected)


def test_large_batches_spend_exactly_their_budgets():
    generator = torch.Generator().manual_seed(1)
    affinity = torch.randn(300, 400, generator=generator).abs()
    budgets = torch.randint(0, 300, (400,), generator=generator)
    assert len(mutual_choice(affinity, 12_345)) == 12_345
    assert torch.equal(feature_choice(affinity, budgets).per_feature(), budgets)
    assert (token_choice(affinity, 31).per_token() == 31).all()


def test_the_choice_is_made_in_float32_and_only_values_carry_gradient():
    affinity = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    matches = mutual_choice(affinity, 8)
    matches.value.sum().backward()
    assert torch.equal(affinity.grad > 0, matches.to_dense() > 0)
    assert matches.value.dtype == torch.float64
    assert mutual_choice(affinity.bfloat16(), 8).value.dtype == torch.bfloat16


def test_midpoint_lies_between_the_last_chosen_and_the_first_rejected():
    generator = torch.Generator().manual_seed(2)
    affinity = torch.randn(40, 7, generator=generator).abs()
    budgets = torch.tensor([1, 2, 3, 10, 39, 40, 0])
    found = midpoint_thresholds(affinity, feature_choice(affinity, budgets))
    ordered = affinity.sort(0, descending=True).values
    for i, m in enumerate(budgets.tolist()):
        last = ordered[m - 1, i] if m > 0 else ordered[0, i]
        first = ordered[m, i] if m < 40 else ordered[-1, i]
        torch.testing.assert_close(found[i], (last + first) / 2)


def test_midpoint_is_never_negative():
    affinity = torch.tensor([[2.0, -1.0], [-3.0, -2.0]])
    found = midpoint_thresholds(affinity, feature_choice(affinity, torch.tensor([2, 2])))
    assert torch.equal(found, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: token_choice(a, 0), "k=0 is out of range: a token has 1 to 3 features"),
        (lambda a: token_choice(a, 4), "k=4 is out of range"),
        (lambda a: mutual_choice(a, 7), "budget=7 is out of range: the batch has 6 pairs"),
        (lambda a: mutual_choice(a, -1), "budget=-1 is out of range"),
        (lambda a: mutual_choice(a[0], 1), r"must be \(tokens, features\), not \(3,\)"),
        (lambda a: feature_choice(a, torch.tensor([1, 1])), "budgets must be 3 integers"),
        (lambda a: feature_choice(a, torch.ones(3)), "budgets must be 3 integers"),
        (lambda a: feature_choice(a, torch.tensor([0, 1, 3])), "budgets from 0 to 3"),
        (lambda a: feature_choice(a, torch.tensor([0, -1, 2])), "budgets from -1 to 2"),
    ],
)
def test_impossible_requests_are_explained(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
