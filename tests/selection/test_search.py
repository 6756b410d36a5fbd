"""A search in two passes against tiles, on scores that are a tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.matches import Matches, Pairs
from lightning_sae.selection import (
    Scores,
    Search,
    TensorScores,
    candidates_of_batch,
    largest_of_each_feature,
    largest_of_each_token,
    largest_pairs,
    pairs_above,
    search,
)

TOKENS, FEATURES, BLOCK = 90, 70, 8


class TensorSearch(Search):
    """What kernels do, of all scores at once."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__((scores.shape[0], scores.shape[1]), scores.device)
        self.scores = scores

    def block_maxima(
        self, rows: slice, thresholds: Tensor | None = None, *, rows_are_tokens: bool
    ) -> tuple[Tensor, Tensor]:
        some = self.scores[rows] if rows_are_tokens else self.scores.T[rows]
        padded = functional.pad(some, (0, -some.shape[1] % BLOCK), value=-torch.inf)
        counts = torch.zeros(len(some), dtype=torch.int32)
        if thresholds is not None:
            counts += (some > thresholds[rows, None].clamp_min(0)).sum(1)
        return padded.unflatten(1, (-1, BLOCK)).amax(2), counts

    def pairs_above(self, thresholds: Tensor, most: int | None = None) -> Pairs | None:
        feature, token = (~(self.scores <= thresholds)).T.nonzero(as_tuple=True)
        if most is not None and len(token) > most:
            return None
        return token, feature, self.scores[token, feature]


def both(scores: Tensor) -> tuple[Scores, Scores]:
    """Scores that are searched, and the same without a search."""
    searched = TensorScores(scores)
    searched.search = TensorSearch(scores)
    return searched, TensorScores(scores)


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


def test_what_is_found_must_be_finite():
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        TensorSearch(torch.tensor([[0.25, torch.nan]])).above(torch.tensor([0.5]))
