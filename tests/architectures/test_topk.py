"""TopK: the same number of matches for every token."""

import copy

import pytest
import torch

from lightning_sae import TopKSAE
from tests.helpers.superposition import superposition


def test_every_token_gets_its_k_largest_affinities():
    torch.manual_seed(0)
    sae = TopKSAE(8, 24, k=3)
    x = superposition(128, 8, n_features=16, seed=0)
    sae.loss(x)
    codes = sae.encode(x)
    affinities = (x * sae.scales(x) - sae.b_dec) @ sae.encoder.weight.T
    expected = affinities.topk(3).values.relu()
    torch.testing.assert_close(codes.topk(3).values, expected)
    assert (codes > 0).sum(1).max() == 3
    torch.testing.assert_close(sae.eval().encode(x), codes)  # no batch, no threshold needed


@pytest.mark.parametrize("importance", ["affinity", "gain"])
def test_multi_k_gradients_equal_dense_autograd(importance):
    """Gao et al.: the loss with k, plus an eighth of the loss with 4 k; AuxK on what k leaves."""
    torch.manual_seed(0)
    sae = TopKSAE(8, 24, 2, multi_k_coefficient=1 / 8, importance=importance).double()
    sae.history.dead_after_tokens = 100
    x = superposition(64, 8, n_features=16, seed=0).double() * 7 + 20
    sae.loss(x)  # sets the scale
    sae.history.tokens_since_fired[:10] = 1000  # so that AuxK has something to do
    reference = copy.deepcopy(sae)
    loss, stats = sae.loss(x)
    loss.backward()

    scaled = x * reference.scales(x)
    affinities = (scaled - reference.b_dec) @ reference.encoder.weight.T + reference.encoder.bias
    dictionary = reference.W_dec / reference.W_dec.norm(dim=1, keepdim=True)
    scores = affinities
    if importance == "gain":
        along = (scaled - reference.b_dec) @ dictionary.T
        scores = affinities.relu() * (2 * along - affinities)

    def error(k: int) -> torch.Tensor:
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
        codes = affinities * chosen * (scores > 0)
        return scaled - codes @ dictionary - reference.b_dec

    dead = reference.history.tokens_since_fired >= 100
    top = affinities[:, dead].relu().topk(4)
    extra = torch.zeros_like(affinities[:, dead]).scatter(1, top.indices, top.values)
    left = error(2).detach()
    aux = (left - extra @ dictionary[dead]).pow(2).mean() / (left - left.mean(0)).pow(2).mean()
    dense = error(2).pow(2).mean() + error(8).pow(2).mean() / 8 + aux / 32
    dense.backward()
    assert stats["multi_k_loss"] > 0
    torch.testing.assert_close(loss, dense)
    for (name, ours), theirs in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_training_with_multi_k_helps_to_reconstruct_with_more_matches_than_k():
    def error_with(k: int, coefficient: float) -> float:
        torch.manual_seed(0)
        sae = TopKSAE(8, 24, 1, multi_k_coefficient=coefficient)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for step in range(200):
            loss, _ = sae.loss(superposition(256, 8, n_features=16, seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.normalize_decoder()
        sae.eval().k = k
        x = superposition(1024, 8, n_features=16, seed=999)
        return (sae(x) - x).square().mean().item()

    assert error_with(4, coefficient=1 / 8) < 0.8 * error_with(4, coefficient=0.0)


def test_multi_k_is_off_and_then_costs_nothing():
    sae = TopKSAE(8, 24, k=20)  # 4 k would be more than there are features
    assert "multi_k_loss" not in sae.loss(superposition(64, 8, n_features=16, seed=0))[1]


@pytest.mark.parametrize("arguments", [{}, {"multi_k": 25}, {"multi_k": 0}])
def test_multi_k_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match=r"multi_k=\d+ is out of range: .* n_features=24"):
        TopKSAE(8, 24, k=20, multi_k_coefficient=1 / 8, **arguments)
    with pytest.raises(ValueError, match="multi_k_coefficient=-1 must be a finite number"):
        TopKSAE(8, 24, k=2, multi_k_coefficient=-1)


def test_defaults_are_the_source_s():
    sae = TopKSAE(768, 8, k=2)
    assert (sae.revival.coefficient, sae.revival.k) == (1 / 32, 384)
    assert sae.history.dead_after_tokens == 10_000_000
    assert (sae.multi_k_coefficient, sae.multi_k) == (0.0, 8)
