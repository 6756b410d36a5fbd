"""Affinities by the tile, and the gradient of matched ones, against the dense affinities."""

import pytest
import torch

from lightning_sae.allocation import (
    Matches,
    RankDiscount,
    feature_choice,
    feature_choice_counting,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from lightning_sae.kernels import maxima, pairs
from lightning_sae.sparse import (
    EncoderScores,
    encode,
    matched_affinities,
    rows,
)

TOKENS, FEATURES, D_MODEL = 5, 6, 3


@pytest.mark.parametrize("dense_above", [0.0, 1.0])  # both ways of computing it
@pytest.mark.parametrize("budget", [0, 7, TOKENS * FEATURES])
def test_equals_dense_autograd(budget: int, dense_above: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "DENSE_ABOVE", dense_above)
    parameters = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((TOKENS, D_MODEL), (D_MODEL,), (FEATURES, D_MODEL), (FEATURES,))
    ]
    x, origin, weight, bias = parameters

    def dense() -> torch.Tensor:
        return (x - origin) @ weight.T + bias

    chosen = mutual_choice(dense().detach(), budget)

    def sparse(*_: torch.Tensor) -> torch.Tensor:
        values = dense().detach()[chosen.token, chosen.feature]
        matches = Matches(chosen.token, chosen.feature, values, chosen.shape)
        return matched_affinities(x, origin, weight, bias, matches)

    assert torch.equal(sparse(), chosen.value)
    assert torch.autograd.gradcheck(sparse, parameters)
    upstream = torch.randn(len(chosen), dtype=torch.float64)
    ours = torch.autograd.grad(sparse(), parameters, upstream)
    theirs = torch.autograd.grad(dense()[chosen.token, chosen.feature], parameters, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_scores_are_the_dense_affinities():
    x, weight, bias = torch.randn(20, 5), torch.randn(30, 5), torch.randn(30)
    dense = x @ weight.T + bias
    scores = EncoderScores(x, weight, bias)
    torch.testing.assert_close(scores.dense(), dense)
    torch.testing.assert_close(scores.token_rows(slice(3, 9), slice(2, 5)), dense[3:9, 2:5])
    torch.testing.assert_close(scores.feature_rows(slice(4, 8)), dense[:, 4:8].T)


def test_scores_can_be_something_else_than_affinities():
    x, weight, bias = torch.randn(20, 5), torch.randn(30, 5), torch.randn(30)
    by_token, by_feature = torch.rand(20, 1), torch.rand(30)
    scores = EncoderScores(x, weight, bias, by_token.squeeze(1), lambda a, _, i: a * by_feature[i])
    dense = (x @ weight.T + bias) * by_token * by_feature
    torch.testing.assert_close(scores.dense(), dense)
    torch.testing.assert_close(scores.token_rows(slice(3, 9), slice(2, 5)), dense[3:9, 2:5])
    torch.testing.assert_close(scores.feature_rows(slice(4, 8)), dense[:, 4:8].T)
    assert scores.feature_rows(slice(4, 8)).is_contiguous()


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "pairs_above", pairs.pairs_above)
    monkeypatch.setattr(encode, "some_pairs_above", pairs.some_pairs_above)
    monkeypatch.setattr(encode, "block_maxima", maxima.block_maxima)
    monkeypatch.setattr(encode, "has_kernel", lambda tensor: True)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)


@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_find_what_tiles_find(scaled: bool, monkeypatch: pytest.MonkeyPatch):
    """Where there are kernels, here in Triton's interpreter, choices are the same."""
    tokens, features = 200, 150
    shapes = ((tokens, 5), (features, 5), (features,))
    x, weight, bias = (torch.randint(-3, 4, shape).float() for shape in shapes)
    scale = torch.randint(1, 4, (tokens,)).float() if scaled else None
    by_tiles = EncoderScores(x, weight, bias, scale)
    use_kernels(monkeypatch)
    by_kernels = EncoderScores(x, weight, bias, scale)
    assert by_kernels.search is not None
    budgets = torch.arange(features) % 4
    cut = mutual_choice(by_tiles, 200).value.min().item()
    for choose in (
        lambda scores: threshold_choice(scores, torch.arange(features) - 20.0),
        lambda scores: threshold_choice(scores, 5.0),
        lambda scores: token_choice(scores, 3),
        lambda scores: token_choice(scores, 40),  # more than there are blocks
        lambda scores: feature_choice(scores, budgets),
        lambda scores: feature_choice(scores, 50 * (budgets == 1) + 0 * budgets),
        lambda scores: feature_choice(scores, budgets.masked_fill(budgets.cumsum(0) > 1, 0)),
        lambda scores: mutual_choice(scores, 200),
        lambda scores: mutual_choice(scores, 200, guess=0.9 * cut),
        lambda scores: mutual_choice(scores, 200, guess=cut),  # ties at the guess
        lambda scores: mutual_choice(scores, 200, guess=1e9),
        lambda scores: mutual_choice(scores, 6000, guess=-1.0),
        lambda scores: mutual_choice(scores, 0),
        lambda scores: mutual_choice(scores, 200, guess=float("nan")),
        lambda scores: threshold_choice(scores, float("nan")),
        lambda scores: threshold_choice(scores, float("inf")),
        lambda scores: threshold_choice(scores, 5.0, expected=2000),
        lambda scores: threshold_choice(scores, 5.0, expected=10, discount=RankDiscount(2)),
    ):
        found, expected = choose(by_kernels), choose(by_tiles)
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.feature, expected.feature)
        for one, other in zip(found.by_feature, expected.by_feature, strict=True):
            assert torch.equal(one, other)
    thresholds = torch.arange(features) - 20.0
    for given in (budgets, 50 * (budgets == 1) + 0 * budgets):
        one, other = (
            feature_choice_counting(scores, given, thresholds) for scores in (by_kernels, by_tiles)
        )
        assert torch.equal(one.passing, other.passing)
        assert torch.equal(one.matches.to_dense(), other.matches.to_dense())
    with pytest.raises(FloatingPointError):
        threshold_choice(EncoderScores(x, weight * torch.nan, bias), 5.0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_kernels_take_small_batches(tokens: int, with_kernels: None):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(tokens, 5), torch.randn(200, 5), torch.randn(200)
    scores = EncoderScores(x, weight, bias)
    assert scores.search is not None
    found = token_choice(scores, 2)
    torch.testing.assert_close(found.to_dense(), token_choice(scores.dense(), 2).to_dense())


def test_a_useless_guess_does_not_fill_the_memory(
    with_kernels: None, monkeypatch: pytest.MonkeyPatch
):
    """Were it not for the budget, all pairs above the guess would be kept."""
    torch.manual_seed(0)
    monkeypatch.setattr(pairs, "PAIRS_A_TOKEN", 4)
    x, weight, bias = torch.randn(200, 5), torch.randn(150, 5), torch.randn(150)
    scores = EncoderScores(x, weight, bias)
    capacities = []
    search = pairs._search
    monkeypatch.setattr(pairs, "_search", lambda *a: capacities.append(a[-1]) or search(*a))
    found = mutual_choice(scores, 500, guess=1e-3)
    torch.testing.assert_close(found.to_dense(), mutual_choice(scores.dense(), 500).to_dense())
    assert max(capacities) < 1500  # of 15,000


def test_weights_that_are_not_numbers_do_not_fill_the_memory(
    with_kernels: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "PAIRS_A_TOKEN", 4)
    x, weight, bias = torch.randn(200, 5), torch.randn(150, 5) * torch.nan, torch.randn(150)
    capacities = []
    search = pairs._search
    monkeypatch.setattr(pairs, "_search", lambda *a: capacities.append(a[-1]) or search(*a))
    with pytest.raises(FloatingPointError):
        threshold_choice(EncoderScores(x, weight, bias), 0.0)
    assert capacities == [800]
