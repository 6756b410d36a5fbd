"""Gradients left in parts against those that autograd adds up by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lightning_sae.allocation import Matches, mutual_choice, threshold_choice
from lightning_sae.sparse import (
    GradientCollector,
    RowGradient,
    matched_affinities,
    row_gradient,
    sum_directions,
)

FEATURES, WIDTH = 7, 3
Rows = tuple[Tensor, list[RowGradient] | None]


def some_matches(tokens: int, budget: int) -> Matches:
    return mutual_choice(torch.randn(tokens, FEATURES, dtype=torch.float64).abs(), budget)


@settings(deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_the_sum_of_parts_is_that_of_their_matrices(sizes: list[tuple[int, int]], seed: int):
    torch.manual_seed(seed)
    along = torch.randn(FEATURES, WIDTH, dtype=torch.float64)
    parts, expected = [], torch.zeros_like(along)
    for tokens, budget in sizes:
        matches = some_matches(tokens, min(budget, tokens * FEATURES))
        table = torch.randn(tokens, WIDTH, dtype=torch.float64)
        parts.append(RowGradient.of(table, matches.value, matches, along))
        expected += matches.to_dense().T @ table
    direction = functional.normalize(along, dim=1)
    expected -= (expected * direction).sum(1, keepdim=True) * direction
    total = RowGradient.sum(parts)
    torch.testing.assert_close(total.dense(), expected)
    torch.testing.assert_close(total.rows(2, 5), expected[2:5])


def loss_of(encoder: Rows, decoder: Rows, x: Tensor) -> Tensor:
    """A loss that reads two matrices sparsely, one of them twice, and one of them also whole."""
    (weight, weight_parts), (dictionary, parts) = encoder, decoder
    zeros, bias = x.new_zeros(WIDTH), x.new_zeros(FEATURES)
    matches = threshold_choice((x @ weight.T).detach(), 0.1)
    values = matched_affinities(x, zeros, weight, bias, matches, weight_parts)
    all_of_them = sum_directions(matches.with_values(values), dictionary, parts)
    few = matches.select(torch.arange(len(matches) // 2))
    half = sum_directions(few.with_values(torch.ones_like(few.value)), dictionary, parts)
    return (all_of_them.square() * half.cos() + x @ dictionary.T @ dictionary.square()).sum()


def plain(weight: Tensor, dictionary: Tensor, x: Tensor) -> Tensor:
    return loss_of((weight, None), (dictionary, None), x)


def collected(weight: Tensor, dictionary: Tensor, x: Tensor) -> Tensor:
    collector = GradientCollector(lambda parameter: parameter)
    encoder, decoder = map(collector.collect, (weight, dictionary))
    assert collector.collect(weight) is encoder
    return collector.forget_before(loss_of(encoder, decoder, x))


@pytest.fixture
def inputs() -> list[Tensor]:
    shapes = (FEATURES, WIDTH), (FEATURES, WIDTH), (5, WIDTH)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_collected_gradients_are_those_of_autograd(inputs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_gradient, "_ROWS", 3)
    assert torch.autograd.gradcheck(collected, inputs)
    expected = torch.autograd.grad(plain(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(collected(*inputs), inputs), expected)


def test_a_backward_pass_finds_nothing_of_an_earlier_one(inputs):
    expected = torch.autograd.grad(plain(*inputs), inputs)
    loss = collected(*inputs)
    torch.autograd.grad(loss, inputs[2], retain_graph=True)  # leaves parts that no one collects
    for _ in range(2):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_without_gradients_nothing_is_collected(inputs):
    with torch.no_grad():
        loss = collected(*inputs)
        torch.testing.assert_close(loss, plain(*inputs))
    assert not loss.requires_grad
