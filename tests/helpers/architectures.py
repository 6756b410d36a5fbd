"""Every architecture, small, and what tests do with one."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_sae import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.allocation import Matches
from tests.helpers.superposition import superposition

D_MODEL, N_FEATURES, K = 16, 48, 4
ARCHITECTURES = {
    "standard": partial(StandardSAE, D_MODEL, N_FEATURES, 0.5),
    "jumprelu": partial(JumpReLUSAE, D_MODEL, N_FEATURES, K, bandwidth=0.1),
    "gated": partial(GatedSAE, D_MODEL, N_FEATURES, K),
    "topk": partial(TopKSAE, D_MODEL, N_FEATURES, K),
    "mutual_choice": partial(MutualChoiceSAE, D_MODEL, N_FEATURES, K),
    "feature_choice_uniform": partial(
        FeatureChoiceSAE,
        *(D_MODEL, N_FEATURES, K),
        budgets="uniform",
        per_batch=True,
        mutual_choice_share=0,
    ),
    "feature_choice_zipf": partial(
        FeatureChoiceSAE, D_MODEL, N_FEATURES, K, mutual_choice_share=0, zipf_exponent=1.0
    ),
    "feature_choice_in_two_phases": partial(
        FeatureChoiceSAE,
        *(D_MODEL, N_FEATURES, K),
        mutual_choice_tokens=1000,
        zipf_exponent=1.0,  # so few tokens allow no fit
        zipf_offset=1.0,
    ),
}
every_architecture = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
with_affinities_as_codes = pytest.mark.parametrize(
    "make",
    [make for name, make in ARCHITECTURES.items() if name not in ("jumprelu", "gated")],
    ids=[name for name in ARCHITECTURES if name not in ("jumprelu", "gated")],
)
with_importance = pytest.mark.parametrize(
    "make", list(ARCHITECTURES.values())[3:], ids=list(ARCHITECTURES)[3:]
)


def activations(tokens: int = 64) -> Tensor:
    """Activations with a large mean and an odd scale, as residual streams have them."""
    return superposition(tokens, D_MODEL, n_features=32, seed=tokens) * 7 + 20


def train(sae: SparseAutoencoder, steps: int, lr: float = 3e-3) -> list[float]:
    """Train in a plain loop, no Trainer."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss, _ = sae.loss(superposition(256, D_MODEL, n_features=32, seed=step) * 7 + 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        losses.append(loss.item())
    return losses


def chosen(sae: SparseAutoencoder, x: Tensor) -> Matches:
    """Return what `loss` chooses over a batch of activations (tokens, d_model), as it stands."""
    scaled = sae.scaled(x)
    with torch.no_grad():
        return sae.matches_of(scaled, sae.choose(sae.scores(scaled)).matches)


def affinities(sae: SparseAutoencoder, scaled: Tensor) -> Tensor:
    """Return the affinities (tokens, n_features) of scaled activations, written out."""
    return (scaled - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
