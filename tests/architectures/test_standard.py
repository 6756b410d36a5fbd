"""Standard: ReLU codes and a penalty that warms up."""

import pytest
import torch
from torch.nn import functional

from lightning_sae import StandardSAE
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


@pytest.mark.parametrize("arguments", [{"l1_coefficient": -1.0}, {"l1_warmup_tokens": -5}])
def test_negative_settings_are_refused(arguments: dict):
    with pytest.raises(ValueError, match="must be a finite number, 0 or more"):
        StandardSAE(8, 24, **arguments)
