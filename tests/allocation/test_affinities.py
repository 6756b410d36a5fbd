"""What comes out of a choice from a tensor, and from scores."""

import pytest
import torch

from lightning_sae.allocation import TensorScores, mutual_choice
from lightning_sae.allocation.affinities import as_scores


def test_the_choice_is_made_in_float32_and_only_values_carry_gradient():
    affinity = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    matches = mutual_choice(affinity, 8)
    matches.value.sum().backward()
    assert torch.equal(affinity.grad > 0, matches.to_dense() > 0)
    assert matches.value.dtype == torch.float64
    assert mutual_choice(affinity.bfloat16(), 8).value.dtype == torch.bfloat16


def test_values_of_scores_are_scores():
    affinity = torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    value = mutual_choice(TensorScores(affinity), 8).value
    assert value.dtype == torch.float32
    assert not value.requires_grad


def test_scores_are_read_as_they_are():
    scores = TensorScores(torch.zeros(2, 3))
    assert as_scores(scores) is scores
    with pytest.raises(ValueError, match=r"affinities must be \(tokens, features\), not \(3,\)"):
        as_scores(torch.zeros(3))
