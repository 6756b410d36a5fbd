"""Passes over tiles, which hold few pairs at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection import (
    Scores,
    TensorScores,
    candidates,
    candidates_of_batch,
    largest_of_each_feature,
    largest_of_each_token,
    pairs_above,
    scores,
)
from lightning_sae.selection.pair_buffer import PairBuffer

CHOICES: dict[str, Callable[[Scores], Matches]] = {
    "batch": lambda scores: candidates_of_batch(scores, 3),
    "tokens": lambda scores: largest_of_each_token(scores, 1),
    "features": lambda scores: largest_of_each_feature(scores, torch.zeros(5).long())[0],
    "above": lambda scores: pairs_above(scores, torch.tensor(0.5)),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("tokens", [torch.zeros(4, 5), -torch.ones(1, 5)], ids=["four", "one"])
def test_scores_keep_their_dtype_where_none_is_found(
    choose: Callable[[Scores], Matches], tokens: Tensor
):
    matches = choose(TensorScores(tokens.double()))
    assert (len(matches), matches.value.dtype) == (0, torch.float64)


@pytest.mark.parametrize("name", CHOICES)
def test_scores_keep_their_dtype_where_there_are_no_tokens(name: str):
    """Ranks with tokens and without must agree on what they send each other."""
    matches = CHOICES[name](TensorScores(torch.zeros(0, 5).double()))
    assert (len(matches), matches.value.dtype) == (0, torch.float64)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs a buffer holds after each tile, of 256 scores."""
    sizes = []

    class Counted(PairBuffer):
        def add(self, *pairs: Tensor) -> None:
            super().add(*pairs)
            sizes.append(len(self))

    monkeypatch.setattr(candidates, "PairBuffer", Counted)
    monkeypatch.setattr(scores, "_PAIRS", 8 * 32)
    return sizes


def test_few_candidates_are_kept_though_larger_ones_come_later(sizes: list[int]):
    rising = torch.arange(1.0, 321).expand(8, -1)  # in ten tiles
    chosen = largest_of_each_token(TensorScores(rising), 4)
    assert chosen.feature.tolist() == [316, 317, 318, 319] * 8
    assert max(sizes) <= 3 * len(chosen) + 8 * 32  # of 2,560 that are above all before them


@pytest.mark.parametrize("guess", [None, 0.5])
def test_few_candidates_of_a_batch_are_kept_though_larger_ones_come_later(
    sizes: list[int], guess: float | None
):
    rising = torch.arange(1.0, 321).expand(8, -1)
    found = candidates_of_batch(TensorScores(rising), 32, guess)
    assert {317, 318, 319} <= set(found.feature.tolist())
    assert max(sizes) <= 2 * 32 + 8 * 32


def test_a_guess_leaves_out_what_is_below():
    values = torch.tensor([[0.25, 0.5, 0.75]])
    assert candidates_of_batch(TensorScores(values), 3, guess=0.5).feature.tolist() == [1, 2]


def test_nothing_is_above_itself():
    values = torch.tensor([[0.25, 0.5, 0.75], [0.3, 0.4, -1.0]])
    found = pairs_above(TensorScores(values), torch.tensor([0.25, 0.5, -2.0]))
    assert found.token.tolist() == [0, 1]
    assert found.feature.tolist() == [2, 0]


def test_tokens_above_thresholds_are_counted_where_there_are_any():
    values = torch.tensor([[0.25, 0.5, 0.75], [0.3, 0.4, -1.0]])
    counts = torch.tensor([1, 0, 1])
    pairs, passing = largest_of_each_feature(
        TensorScores(values), counts, torch.tensor([0.25, 0.1, -2.0])
    )
    assert passing.tolist() == [1, 2, 1]
    assert passing.dtype == torch.int64
    assert pairs.token.tolist() == [0, 1]
    assert pairs.feature.tolist() == [2, 0]
    assert largest_of_each_feature(TensorScores(values), counts)[1] is None
