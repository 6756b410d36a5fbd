"""The gradient of matched affinities against that of the dense affinities."""

import pytest
import torch

from lightning_sae.allocation import Matches, mutual_choice
from lightning_sae.sparse import matched_affinities, rows

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
