"""Token choice against a brute force that sorts all pairs."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import mutual_choice, token_choice
from lightning_sae.selection import scores
from tests.allocation.brute_force import (
    AWKWARD,
    PAIRS,
    SIZES,
    affinities,
    awkward,
    by_token,
    check,
    thorough,
)


@thorough
@given(affinities(), st.data())
def test_is_the_brute_force(affinity: Tensor, data: st.DataObject):
    k = data.draw(st.integers(1, affinity.shape[1]))
    check(token_choice(affinity, k), by_token(affinity, k))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", AWKWARD)
def test_is_the_brute_force_from_tiles(case: str, size: tuple[int, int], pairs: int):
    affinity = awkward(case, size)
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=24):
        for k in (1, 5, 20, size[1]):
            check(token_choice(affinity, k), by_token(affinity, k))


def test_is_mutual_choice_for_one_token():
    affinity = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 50):
        assert torch.equal(
            token_choice(affinity, k).to_dense(), mutual_choice(affinity, k).to_dense()
        )


def test_large_batches_spend_exactly_their_budgets():
    affinity = torch.randn(300, 400, generator=torch.Generator().manual_seed(1)).abs()
    assert (token_choice(affinity, 31).per_token() == 31).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_affinities_must_be_finite(value: float):
    affinity = torch.rand(32, 64)
    affinity[20, 30] = value
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        token_choice(affinity, 1)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k=0 is out of range: a token has 1 to 3 features"),
        (4, "k=4 is out of range"),
    ],
)
def test_impossible_requests_are_explained(k: int, message: str):
    with pytest.raises(ValueError, match=message):
        token_choice(torch.zeros(2, 3), k)
