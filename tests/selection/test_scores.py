"""Tiles cover all scores, here or shared out over processes."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_sae.allocation import (
    feature_choice,
    feature_choice_counting,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from lightning_sae.parallel.share import Share, share_features
from lightning_sae.selection import TensorScores, scores
from tests.helpers.ddp import run_on

TOKENS, FEATURES = 12, 49  # features that two processes cannot share equally


@pytest.mark.parametrize("pairs", [1, 100, 10**6])  # in a tile
@pytest.mark.parametrize("size", [(20, 30), (0, 3), (1, 64)])
def test_tiles_cover_all_scores(size: tuple[int, int], pairs: int):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    by_feature, by_token = torch.full(size, torch.nan), torch.full(size, torch.nan)
    with patch.multiple(scores, _PAIRS=pairs, _TOKENS=8):
        for features, tile in TensorScores(values).feature_tiles():
            by_feature[:, features] = tile.rows.T
        for tokens, start, tile in TensorScores(values).token_tiles():
            by_token[tokens, start : start + tile.rows.shape[1]] = tile.rows
    assert torch.equal(by_feature, values)
    assert torch.equal(by_token, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_a_tensor_are_wide_and_carry_no_gradient(dtype: torch.dtype):
    values = torch.randn(4, 6).to(dtype).requires_grad_()
    found = TensorScores(values)
    assert (found.shape, len(found)) == ((4, 6), 4)
    for one, other in (
        (found.dense(), values),
        (found.token_rows(slice(1, 3), slice(2, 5)), values[1:3, 2:5]),
        (found.feature_rows(slice(2, 5)), values[:, 2:5].T),
    ):
        assert one.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(one, other.to(one.dtype))
        assert one.is_contiguous()
        assert not one.requires_grad


def test_a_tensor_must_have_two_dimensions():
    with pytest.raises(ValueError, match=r"must be \(tokens, features\), not \(2, 3, 4\)"):
        TensorScores(torch.zeros(2, 3, 4))


class SharedScores(TensorScores):
    """Scores of which this process has those of its own features."""

    def __init__(self, values: Tensor, share: Share) -> None:
        super().__init__(values[:, share.here])
        self.shape, self.share = (len(values), share.features), share


def everything_found(found: TensorScores) -> list[Tensor]:
    budgets, thresholds = torch.arange(FEATURES) % 4, torch.linspace(-1, 1, FEATURES)
    counted = feature_choice_counting(found, budgets, thresholds)
    choices = [
        token_choice(found, 3),
        mutual_choice(found, 40),
        mutual_choice(found, 40, guess=0.5),
        feature_choice(found, budgets),
        counted.matches,
        threshold_choice(found, thresholds),
    ]
    return [found.dense(), counted.passing, *(each.to_dense() for each in choices)]


def find_in_own_features(process: int, values: Tensor) -> list[Tensor]:
    share = share_features(FEATURES, init_device_mesh("cpu", (2,)))
    return everything_found(SharedScores(values, share))


@pytest.mark.parametrize("tied", [False, True])
def test_processes_that_share_out_features_find_what_one_would(tied: bool):
    values = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(1))
    values = values.round() if tied else values
    expected = everything_found(TensorScores(values))
    assert torch.equal(expected[0], values)
    for found in run_on(2, find_in_own_features, values):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def spoil(process: int) -> None:
    share = share_features(FEATURES, init_device_mesh("cpu", (2,)))
    values = torch.zeros(TOKENS, FEATURES)
    values[3, 30] = torch.nan  # a feature of the second
    with pytest.raises(FloatingPointError, match="scores are not finite"):
        token_choice(SharedScores(values, share), 3)


def test_all_processes_notice_what_is_not_finite_on_one():
    run_on(2, spoil)
