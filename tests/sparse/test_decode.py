"""Sums of directions against the dense product, values and gradients."""

import pytest
import torch
from torch.nn import functional

from lightning_sae.allocation import mutual_choice, threshold_choice
from lightning_sae.sparse import row_sums, rows, sum_directions


@pytest.mark.parametrize("budget", [0, 1, 8, 48])  # none, few (gathered), many (dense), all
def test_equals_the_dense_product(budget: int):
    affinities = torch.randn(6, 8, dtype=torch.float64).abs()
    dictionary = torch.randn(8, 3, dtype=torch.float64)
    matches = mutual_choice(affinities, budget)
    expected = matches.to_dense() @ functional.normalize(dictionary, dim=1)
    torch.testing.assert_close(sum_directions(matches, dictionary), expected)


@pytest.mark.parametrize("dense_above", [0.0, 1.0])  # both ways of computing it
def test_gradients(dense_above: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "DENSE_ABOVE", dense_above)
    monkeypatch.setattr(row_sums, "_ROWS", 3)
    affinities = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    dictionary = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def reconstruct(affinities: torch.Tensor, dictionary: torch.Tensor) -> torch.Tensor:
        return sum_directions(threshold_choice(affinities, 0.1), dictionary)

    assert torch.autograd.gradcheck(reconstruct, (affinities, dictionary))


def test_tokens_without_a_match_become_zero():
    affinities = torch.tensor([[-1.0, -1.0], [2.0, -1.0], [-1.0, -1.0]])
    result = sum_directions(threshold_choice(affinities, 0.0), torch.eye(2))
    assert torch.equal(result, torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
