"""Standard: ReLU codes and a penalty that warms up."""

import pytest
import torch
from torch.nn import functional

from lightning_sae import StandardSAE
from lightning_sae.checks import UsageError
from tests.helpers.superposition import superposition


def test_codes_are_the_relu_of_the_affinities():
    torch.manual_seed(0)
    sae = StandardSAE(8, 24)
    x = superposition(64, 8, n_features=16, seed=0)
    sae.loss(x)
    affinities = (x * sae.input_scale - sae.b_dec) @ sae.encoder.weight.T
    torch.testing.assert_close(sae.encode(x), functional.relu(affinities))


def test_the_penalty_rises_over_the_warm_up():
    torch.manual_seed(0)
    sae = StandardSAE(8, 24, 2.0, l1_warmup_tokens=128)
    x = superposition(64, 8, n_features=16, seed=0)
    penalties = [sae.loss(x)[1]["sparsity_loss"].item() for _ in range(4)]
    full = 2.0 * sae.encode(x).sum().item() / 64 / 8
    assert penalties == pytest.approx([0, full / 2, full, full], rel=1e-4)


def test_more_penalty_means_fewer_matches():
    def matches_per_token(coefficient: float) -> float:
        torch.manual_seed(0)
        sae = StandardSAE(8, 24, coefficient)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for step in range(100):
            loss, stats = sae.loss(superposition(256, 8, n_features=16, seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.normalize_decoder()
        return stats["l0"].item()

    assert matches_per_token(3.0) < matches_per_token(0.3) < matches_per_token(0.0)


def test_with_a_k_the_weight_is_moved_until_tokens_have_so_many_matches():
    torch.manual_seed(0)
    sae = StandardSAE(8, 24, 0.1, l1_warmup_tokens=2560, k=3)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    weights, l0 = [], []
    for step in range(300):
        loss, stats = sae.loss(superposition(256, 8, n_features=16, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        weights.append(stats["penalty_weight"].item())
        l0.append(stats["l0"].item())
    assert weights[:10] == pytest.approx([0.1] * 10)  # that of the warm-up
    assert weights[-1] > 0.2
    assert sum(l0[-50:]) / 50 == pytest.approx(3, rel=0.05)


def test_a_weight_of_zero_cannot_be_moved():
    with pytest.raises(UsageError, match=r"^l1_coefficient=0 is no weight"):
        StandardSAE(8, 24, 0.0, k=3)


@pytest.mark.parametrize("arguments", [{"l1_coefficient": -1.0}, {"l1_warmup_tokens": -5}])
def test_negative_settings_are_refused(arguments: dict):
    with pytest.raises(ValueError, match="must be a finite number, 0 or more"):
        StandardSAE(8, 24, **arguments)
