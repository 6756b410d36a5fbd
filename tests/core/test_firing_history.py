"""Counters of firings: exact, in tokens, and equal whatever came in between."""

import pytest
import torch

from lightning_sae import TopKSAE
from lightning_sae.core import FiringHistory
from lightning_sae.parallel import Ranks
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations, chosen
from tests.helpers.superposition import superposition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_dead_features_are_counted_in_tokens_and_revived():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, dead_after_tokens=128)
    sae.encoder.bias.data[:10] = -1e3  # these cannot fire
    for seed in range(3):
        _, stats = sae.loss(activations(64) + seed)
    assert (sae.history.tokens_since_fired[:10] == 192).all()
    assert sae.history.dead()[:10].all()
    assert stats["dead_fraction"] >= 10 / N_FEATURES
    sae.encoder.bias.data[0] = 1e3
    sae.loss(activations(64))
    assert sae.history.tokens_since_fired[0] == 0


@pytest.fixture
def default_bfloat16():
    """As in a step of "bf16-true"."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_density_is_the_mean_until_the_window_is_full_and_then_follows():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, dead_after_tokens=3 * 64)
    counts = []
    for seed in range(3):
        x = superposition(64, D_MODEL, n_features=32, seed=seed)
        counts.append(chosen(sae, x).per_feature() if seed else None)
        sae.loss(x)
        if seed == 0:
            counts[0] = (sae.history.density * 64).round()
    torch.testing.assert_close(sae.history.density, sum(counts) / (3 * 64))
    before = sae.history.density.clone()
    now = chosen(sae, x).per_feature() / 64
    sae.loss(x)
    torch.testing.assert_close(sae.history.density, before + (now - before) / 3)
    assert sae.history.density.sum() == pytest.approx(K, rel=0.05)


def test_density_has_32_bits_also_where_16_are_the_default(default_bfloat16):
    sae = TopKSAE(D_MODEL, N_FEATURES, K).float()
    x = activations(300).float()
    sae.loss(x)
    fires = chosen(sae, x).per_feature()
    assert torch.equal(
        sae.history.density, fires.float() / torch.tensor(300.0, dtype=torch.float32)
    )


def test_a_batch_without_tokens_changes_nothing():
    history = FiringHistory(2, dead_after_tokens=100)
    for tokens in (0, 10, 0):
        history.update(torch.tensor([tokens // 2, 0]), tokens, Ranks())
    assert history.density.tolist() == [0.5, 0.0]
    assert history.tokens_since_fired.tolist() == [0, 10]
