"""A search in two passes against tiles, on scores that are a tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection import (
    Scores,
    candidates_of_batch,
    largest_of_each_feature,
    largest_of_each_token,
    largest_pairs,
    pairs_above,
    search,
)
from tests.helpers.searches import TensorSearch, both

TOKENS, FEATURES = 90, 70


@pytest.fixture(params=[torch.randn, torch.randint], ids=["distinct", "ties"])
def scores(request: pytest.FixtureRequest) -> Tensor:
    generator, size = torch.Generator().manual_seed(0), (TOKENS, FEATURES)
    if request.param is torch.randn:
        return torch.randn(size, generator=generator)
    return torch.randint(-5, 6, size, generator=generator).float()


CHOICES: dict[str, Callable[[Scores], Matches]] = {
    "no pair": lambda scores: largest_pairs(candidates_of_batch(scores, 0), 0),
    "a pair": lambda scores: largest_pairs(candidates_of_batch(scores, 1), 1),
    "pairs": lambda scores: largest_pairs(candidates_of_batch(scores, 200), 200),
    "most pairs": lambda scores: largest_pairs(candidates_of_batch(scores, 3000), 3000),
    "guessed": lambda scores: largest_pairs(candidates_of_batch(scores, 900, 1.0), 900),
    "guessed too low": lambda scores: largest_pairs(candidates_of_batch(scores, 9, 0.1), 9),
    "of tokens": lambda scores: largest_of_each_token(scores, 2),
    "most of tokens": lambda scores: largest_of_each_token(scores, 60),
    "of features": lambda scores: largest_of_each_feature(scores, torch.arange(FEATURES) % 5)[0],
    "most of one feature": lambda scores: largest_of_each_feature(
        scores, 80 * (torch.arange(FEATURES) == 3)
    )[0],
    "most of features": lambda scores: largest_of_each_feature(scores, torch.arange(FEATURES))[0],
    "above one": lambda scores: pairs_above(scores, torch.tensor(1.0)),
    "above": lambda scores: pairs_above(scores, torch.linspace(-1, 3, FEATURES)),
    "above nothing": lambda scores: pairs_above(scores, torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("pairs", [400, 1 << 31])  # whose maxima are in memory at a time
@pytest.mark.parametrize("choice", CHOICES)
def test_finds_what_tiles_find(
    choice: str, pairs: int, scores: Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "_PAIRS", pairs)
    one, other = (CHOICES[choice](each).sort() for each in both(scores))
    for column in ("token", "feature", "value"):
        assert torch.equal(getattr(one, column), getattr(other, column))


@pytest.mark.parametrize("pairs", [400, 1 << 31])
def test_counts_what_tiles_count(pairs: int, scores: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "_PAIRS", pairs)
    counts, thresholds = torch.arange(FEATURES) % 5, torch.linspace(-1, 3, FEATURES)
    one, other = (largest_of_each_feature(each, counts, thresholds)[1] for each in both(scores))
    assert torch.equal(one, other)
    assert one.dtype == other.dtype == torch.int64
    assert largest_of_each_feature(both(scores)[0], counts)[1] is None


def test_tiles_take_over_where_blocks_are_few(scores: Tensor):
    found = TensorSearch(scores)
    assert found.candidates_of_batch(3000) is None
    assert found.largest_of_each_token(60) is None
    assert found.largest_of_each_feature(torch.full((FEATURES,), 60)) is None


def test_bounds_are_reached_and_thresholds_exceeded():
    found = TensorSearch(torch.tensor([[0.25, 0.5, -1.0]]))
    assert found.at_least(torch.tensor([0.5])).feature.tolist() == [1]
    assert found.at_least(torch.tensor([-2.0])).feature.tolist() == [0, 1]
    assert found.above(torch.tensor([0.5])).feature.tolist() == []
    assert found.above(torch.tensor([[0.25]])).feature.tolist() == [1]  # of a token


@pytest.mark.parametrize("room", [1, 3, 8, 10**6])
def test_pairs_are_found_where_there_is_room(scores: Tensor, room: int):
    found, thresholds = TensorSearch(scores), torch.linspace(1, 3, FEATURES)
    pairs, sound = found.some_above(thresholds, room)
    assert len(pairs) == min(room, scores.numel())
    expected = found.above(thresholds)
    assert bool(sound) == (len(expected) <= room)
    real = pairs.select(pairs.value > 0)
    if sound:
        for column in ("token", "feature", "value"):
            assert torch.equal(getattr(real, column), getattr(expected, column))
    number = pairs.feature * TOKENS + pairs.token
    assert (number.diff() >= 0).all()


def test_what_is_not_finite_is_not_sound():
    for value in (torch.nan, torch.inf):
        _, sound = TensorSearch(torch.tensor([[0.25, value]])).some_above(torch.tensor([0.5]), 2)
        assert not sound


@pytest.mark.parametrize("room", [1, 2, 100])
def test_tokens_get_their_largest_however_little_room_there_is(
    scores: Tensor, room: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "_ROOM", room)
    one, other = (largest_of_each_token(each, 3) for each in both(scores - 2))
    for column in ("token", "feature", "value"):
        assert torch.equal(getattr(one, column), getattr(other, column))


def test_what_is_found_must_be_finite():
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        TensorSearch(torch.tensor([[0.25, torch.nan]])).above(torch.tensor([0.5]))
