"""Matches against the dense codes that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.matches import Matches
from tests.helpers.matches import matches_where


@pytest.fixture
def dense() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator).clamp_min(0)


def test_codes_come_back(dense: Tensor):
    matches = matches_where(dense, dense > 0)
    assert torch.equal(matches.to_dense(), dense)
    assert torch.equal(matches.to_dense(torch.ones(len(matches))), (dense > 0).float())
    assert torch.equal(matches.per_token(), (dense > 0).sum(1))
    assert torch.equal(matches.per_feature(), (dense > 0).sum(0))


def test_only_values_above_zero_fire_as_in_dense_codes():
    token, feature = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 3, 1, 2, 3])
    value = torch.tensor([1.0, 0.0, -2.0, torch.nan, 1e-30, torch.inf])
    matches = Matches(token, feature, value, shape=(4, 4))
    fires = matches.to_dense() > 0
    assert matches.per_token().tolist() == fires.sum(1).tolist() == [1, 1, 1, 0]
    assert matches.per_feature().tolist() == fires.sum(0).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("tokens", [0, 1, 4, 6])
def test_those_of_the_first_tokens(dense: Tensor, tokens: int):
    first = matches_where(dense, dense > 0).of_first(tokens)
    assert torch.equal(first.to_dense(), dense[:tokens])


def test_some_are_selected_by_a_mask_or_by_number(dense: Tensor):
    matches = matches_where(dense, dense > 0)
    expected = torch.where(dense > 0.5, dense, 0)
    mask = matches.value > 0.5
    assert torch.equal(matches.select(mask).to_dense(), expected)
    assert torch.equal(matches.select(mask.nonzero().squeeze(1)).to_dense(), expected)


@settings(deadline=None, derandomize=True)
@given(on=st.lists(st.booleans(), min_size=12, max_size=12))
def test_sorting_turns_the_order_round(on: list[bool]):
    chosen = torch.tensor(on).view(4, 3)
    codes = torch.arange(1.0, 13).view(4, 3) * chosen
    expected = matches_where(codes, chosen)
    feature, token = chosen.T.nonzero(as_tuple=True)
    found = Matches(token, feature, codes[token, feature], (4, 3)).sort()
    for column in ("token", "feature", "value"):
        assert torch.equal(getattr(found, column), getattr(expected, column))
    for one, other in zip(found.by_feature, expected.by_feature, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(expected.by_feature[0], token)
    assert torch.equal(expected.by_feature[1], feature)


def test_other_values_share_the_order_only_where_gradients_need_it(dense: Tensor):
    matches = matches_where(dense, dense > 0)
    assert "by_feature" not in vars(matches.with_values(matches.value))
    differentiable = matches.with_values(matches.value.clone().requires_grad_())
    assert differentiable.by_feature is matches.by_feature
