"""Affinities by the tile, and the gradient of matched ones, against the dense affinities."""

import pytest
import torch

from lightning_sae.allocation import Matches, mutual_choice, threshold_choice
from lightning_sae.sparse import (
    EncoderScores,
    dot_rows,
    encode,
    kernels,
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
    torch.testing.assert_close(scores.of_tokens(slice(3, 9)), dense[3:9])
    torch.testing.assert_close(scores.of_features(slice(4, 8)), dense[:, 4:8].T)


def test_scores_can_be_something_else_than_affinities():
    x, weight, bias = torch.randn(20, 5), torch.randn(30, 5), torch.randn(30)
    by_token, by_feature = torch.rand(20, 1), torch.rand(30)
    scores = EncoderScores(x, weight, bias, lambda a, n, i: a * by_token[n] * by_feature[i])
    dense = (x @ weight.T + bias) * by_token * by_feature
    torch.testing.assert_close(scores.dense(), dense)
    torch.testing.assert_close(scores.of_tokens(slice(3, 9)), dense[3:9])
    torch.testing.assert_close(scores.of_features(slice(4, 8)), dense[:, 4:8].T)
    assert scores.of_features(slice(4, 8)).is_contiguous()


def test_a_kernel_finds_what_tiles_find(monkeypatch: pytest.MonkeyPatch):
    """Where there is a kernel, here in Triton's interpreter, choices are the same."""
    x, weight, bias = (torch.randint(-3, 4, shape).float() for shape in ((20, 5), (30, 5), (30,)))
    by_tiles = EncoderScores(x, weight, bias)
    monkeypatch.setattr(encode, "has_kernel", lambda tensor: True)
    monkeypatch.setattr(encode, "pairs_above", kernels.pairs_above)
    by_kernel = EncoderScores(x, weight, bias)
    assert by_kernel.search is not None
    thresholds = torch.randint(-2, 20, (30,)).float()
    cut = mutual_choice(by_tiles, 60).value.min().item()
    for choose in (
        lambda scores: threshold_choice(scores, thresholds),
        lambda scores: threshold_choice(scores, 5.0),
        lambda scores: mutual_choice(scores, 60),
        lambda scores: mutual_choice(scores, 60, guess=0.9 * cut),
        lambda scores: mutual_choice(scores, 60, guess=cut),  # ties at the guess
        lambda scores: mutual_choice(scores, 60, guess=1e9),
        lambda scores: mutual_choice(scores, 600, guess=-1.0),
    ):
        found, expected = choose(by_kernel), choose(by_tiles)
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.feature, expected.feature)
        for one, other in zip(found.by_feature, expected.by_feature, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(FloatingPointError):
        threshold_choice(EncoderScores(x, weight * torch.nan, bias), 5.0)


def test_dot_rows_are_entries_of_the_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "_ENTRIES", 8)
    left, right = torch.randn(6, 5), torch.randn(9, 5)
    one, other = torch.randint(0, 6, (20,)), torch.randint(0, 9, (20,))
    torch.testing.assert_close(dot_rows(left, one, right, other), (left @ right.T)[one, other])
