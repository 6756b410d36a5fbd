"""Pairs that are collected from tiles."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import Matches, Scores, TensorScores
from lightning_sae.selection import candidates, scores
from lightning_sae.selection.candidates import (
    candidates_of_batch,
    candidates_of_features,
    candidates_of_tokens,
)
from lightning_sae.selection.found import Found


@settings(deadline=None, derandomize=True)
@given(lots=st.lists(st.integers(0, 9), max_size=12), room=st.integers(0, 20))
def test_pairs_come_out_as_they_went_in_however_many(lots: list[int], room: int):
    found = Found((100, 100), room, torch.device("cpu"))
    for _ in range(2):
        pairs = torch.arange(3 * sum(lots)).view(3, -1)
        for lot in pairs.split(lots, dim=1) if lots else ():
            token, feature, value = lot
            found.add(token, feature, value.double())
        assert len(found) == sum(lots)
        kept = found.pairs()
        for column, expected in zip((kept.token, kept.feature, kept.value), pairs, strict=True):
            assert torch.equal(column.long(), expected)
        assert kept.value.dtype == (torch.float64 if lots else torch.float32)
        found.clear()


CHOICES: dict[str, Callable[[Scores], Matches]] = {
    "batch": lambda scores: candidates_of_batch(scores, 3),
    "tokens": lambda scores: candidates_of_tokens(scores, 1),
    "features": lambda scores: candidates_of_features(scores, torch.zeros(5).long()),
    "above": lambda scores: scores.above(torch.tensor(0.5)),
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


def test_few_candidates_are_kept_though_larger_ones_come_later(monkeypatch: pytest.MonkeyPatch):
    sizes = []

    class Counted(Found):
        def add(self, *pairs: Tensor) -> None:
            super().add(*pairs)
            sizes.append(len(self))

    monkeypatch.setattr(candidates, "Found", Counted)
    monkeypatch.setattr(scores, "_PAIRS", 8 * 32)
    rising = torch.arange(1.0, 321).expand(8, -1)  # in ten tiles
    chosen = candidates_of_tokens(TensorScores(rising), 4)
    assert chosen.feature.tolist() == [316, 317, 318, 319] * 8
    assert max(sizes) <= 3 * len(chosen) + 8 * 32  # of 2,560 that are above all before them
