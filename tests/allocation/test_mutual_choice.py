"""Mutual choice against a brute force that sorts all pairs."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import RankDiscount, TensorScores, mutual_choice
from lightning_sae.selection import scores
from tests.allocation.brute_force import (
    AWKWARD,
    PAIRS,
    SIZES,
    affinities,
    awkward,
    by_batch,
    check,
    thorough,
    worth_of,
)
from tests.helpers.searches import both


@thorough
@given(affinities(), st.data())
def test_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    budget = data.draw(st.integers(0, affinity.numel()))
    check(mutual_choice(affinity, budget), by_batch(affinity, budget))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", AWKWARD)
def test_is_the_brute_force_from_tiles(case: str, size: tuple[int, int], pairs: int):
    affinity = awkward(case, size)
    lazy = TensorScores(affinity)
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=24):
        for budget in (0, 1, 4 * size[0], affinity.numel()):
            expected = by_batch(affinity, budget)
            cut = expected[expected > 0].min().item() if (expected > 0).any() else 0.0
            for guess in (None, 0.0, 0.97 * cut, cut, 1.01 * cut, 1e30, -1.0):
                check(mutual_choice(lazy, budget, guess), expected)


@thorough
@given(affinities(), st.data(), st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0]))
def test_is_the_brute_force_with_a_discount(
    affinity: Tensor, data: st.DataObject, k: int, exponent: float
):
    budget = data.draw(st.integers(0, affinity.numel()))
    discount = RankDiscount(k, exponent)
    worth = worth_of(affinity, discount)
    expected = torch.where(by_batch(worth, budget) > 0, affinity, 0)
    check(mutual_choice(affinity, budget, discount=discount), expected)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", AWKWARD)
def test_a_discount_is_the_same_from_tiles(case: str, size: tuple[int, int], pairs: int):
    affinity, discount = awkward(case, size), RankDiscount(4)
    worth = worth_of(affinity, discount)
    lazy = TensorScores(affinity)
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=24):
        for budget in (0, 1, 4 * size[0], affinity.numel()):
            most = by_batch(worth, budget)
            expected = torch.where(most > 0, affinity, 0)
            cut = most[most > 0].min().item() if (most > 0).any() else 0.0
            for guess in (None, 0.0, 0.97 * cut, cut, 1.01 * cut, 1e30, -1.0):
                check(mutual_choice(lazy, budget, guess, discount=discount), expected)


def test_large_batches_spend_exactly_their_budgets():
    affinity = torch.randn(300, 400, generator=torch.Generator().manual_seed(1)).abs()
    assert len(mutual_choice(affinity, 12_345)) == 12_345


@pytest.mark.parametrize("guess", [None, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_affinities_must_be_finite(value: float, guess: float | None):
    affinity = torch.rand(32, 64)
    affinity[20, 30] = value
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        mutual_choice(affinity, 5, guess)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: mutual_choice(a, 7), "budget=7 is out of range: the batch has 6 pairs$"),
        (lambda a: mutual_choice(a, -1), "budget=-1 is out of range"),
        (lambda a: mutual_choice(a[0], 1), r"must be \(tokens, features\), not \(3,\)"),
    ],
)
def test_impossible_requests_are_explained(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


@pytest.mark.parametrize("exponent", [None, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", AWKWARD)
def test_is_the_brute_force_where_a_search_looks_once(
    case: str, size: tuple[int, int], exponent: float | None
):
    affinity = awkward(case, size)
    discount = None if exponent is None else RankDiscount(2, exponent)
    worth = affinity if discount is None else worth_of(affinity, discount)
    for budget in (0, 1, size[0], affinity.numel()):
        chosen = by_batch(worth, budget)
        cut = chosen[chosen > 0].min().item() if (chosen > 0).any() else 0.0
        expected = torch.where(chosen > 0, affinity, 0)
        searched, _ = both(affinity)
        for guess in (0.0, 0.9 * cut, cut, 1.01 * cut, 1e30):  # too low, near, and too high
            given = torch.tensor(guess)
            check(mutual_choice(searched, budget, given, discount=discount), expected)


def test_a_search_that_looks_once_refuses_what_is_not_finite():
    affinity = torch.rand(32, 64)
    affinity[20, 30] = torch.nan
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        mutual_choice(both(affinity)[0], 10, torch.tensor(0.9))
