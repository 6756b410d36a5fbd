"""Scores against their definitions, written out pair by pair."""

from typing import get_args

import pytest
import torch

from lightning_sae.allocation import Importance, score


def definition(importance: str, affinity: float, centred: torch.Tensor, row: torch.Tensor) -> float:
    match importance:
        case "affinity":
            return affinity
        case "token_norm":
            return affinity / float(centred.norm())
        case "gain":
            if affinity <= 0:
                return 0.0
            return float(centred.square().sum() - (centred - affinity * row).square().sum())
    raise AssertionError(importance)


@pytest.mark.parametrize("importance", get_args(Importance))
def test_every_pair(importance: Importance):
    affinities = torch.randn(5, 4, dtype=torch.float64)
    centred = torch.randn(5, 3, dtype=torch.float64)
    dictionary = torch.randn(4, 3, dtype=torch.float64)
    scores = score(affinities, importance, centred=centred, dictionary=dictionary)
    expected = [
        [definition(importance, float(affinities[n, i]), centred[n], dictionary[i])
         for i in range(4)] for n in range(5)
    ]  # fmt: skip
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))
    assert not (scores[affinities <= 0] > 0).any()


def test_all_but_token_norm_rank_alike_where_the_heuristic_is_exact():
    """With orthonormal rows and affinities that are projections."""
    dictionary = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    centred = torch.randn(20, 6, dtype=torch.float64)
    affinities = centred @ dictionary.T
    positive = affinities > 0
    orders = [
        score(affinities, importance, centred=centred, dictionary=dictionary)[positive].argsort()
        for importance in ("affinity", "gain")
    ]
    assert torch.equal(*orders)


def test_a_token_at_the_origin_has_finite_scores():
    zeros = torch.zeros(1, 3)
    scores = score(torch.tensor([[0.5]]), "token_norm", centred=zeros, dictionary=torch.ones(1, 3))
    assert scores.isfinite().all()


def test_an_unknown_importance_is_refused():
    with pytest.raises(ValueError, match="importance='luck' is none of affinity"):
        score(torch.ones(1, 1), "luck", centred=torch.ones(1, 1), dictionary=torch.ones(1, 1))
