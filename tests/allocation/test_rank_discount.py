"""The discount for crowded tokens against loops, and the rules between which it goes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import RankDiscount, mutual_choice, token_choice
from tests.allocation.brute_force import affinities, check, discounted, thorough


@thorough
@given(affinities(), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_is_a_loop_over_tokens(affinity: Tensor, k: int, exponent: float):
    token, feature = (affinity > 0).nonzero(as_tuple=True)
    discount, expected = RankDiscount(k, exponent), discounted(affinity, k, exponent)
    worth = discount(token, affinity[token, feature])
    torch.testing.assert_close(worth, expected[token, feature])
    dense = affinity * discount.shares(affinity)
    torch.testing.assert_close(dense[token, feature], expected[token, feature])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_in_any_order_have_the_same_worth(dtype: torch.dtype):
    token = torch.tensor([0, 0, 0, 1, 1])
    score = torch.tensor([4.0, 9.0, 6.0, 2.0, 1.0], dtype=dtype)
    expected = torch.tensor([4 / 3, 9.0, 3.0, 2.0, 0.5], dtype=dtype)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(RankDiscount(1)(token, score), expected)
    torch.testing.assert_close(RankDiscount(1)(token[order], score[order]), expected[order])


def test_an_extreme_discount_lets_tokens_choose():
    affinity = torch.rand(40, 60, generator=torch.Generator().manual_seed(0)) + 0.1
    by_tokens = token_choice(affinity, 4).to_dense()
    check(mutual_choice(affinity, 4 * 40, discount=RankDiscount(4, 1e4)), by_tokens)


def test_no_discount_is_mutual_choice():
    affinity = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    expected = mutual_choice(affinity, 160).to_dense()
    check(mutual_choice(affinity, 160, discount=RankDiscount(4, 0.0)), expected)


def test_a_crowded_token_gets_fewer():
    affinity = torch.tensor([[4.0, 4.0, 4.0, 4.0, 4.0, 4.0], [3.0, 2.5, 1.5, 0.0, 0.0, 0.0]])
    assert mutual_choice(affinity, 6).per_token().tolist() == [6, 0]
    assert mutual_choice(affinity, 6, discount=RankDiscount(2)).per_token().tolist() == [4, 2]
