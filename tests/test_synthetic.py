"""What the architectures promise, on tokens that sum known features: see that it holds at all.

Features have power-law frequencies and tokens one of three difficulties, the factor by which they
have more features. What holds on real activations is in `notebooks/paper_claims.ipynb`.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, TopKSAE

D_MODEL, DIRECTIONS, N_FEATURES, K, TOKENS = 32, 64, 128, 4, 512
LAW = {"zipf_exponent": 0.8, "zipf_offset": 4.0}
BY = {"importance": "affinity"}  # the paper's way
MAKE = {
    "topk": lambda: TopKSAE(D_MODEL, N_FEATURES, K, aux_coefficient=0),
    "mutual": lambda: MutualChoiceSAE(D_MODEL, N_FEATURES, K, aux_coefficient=0, **BY),
    "uniform": lambda: FeatureChoiceSAE(
        *(D_MODEL, N_FEATURES, K),
        budgets="uniform",
        per_batch=True,
        mutual_choice_tokens=400 * TOKENS,
        **BY,
    ),
    "measured": lambda: FeatureChoiceSAE(
        D_MODEL, N_FEATURES, K, mutual_choice_tokens=400 * TOKENS, dead_after_tokens=50_000, **BY
    ),
    "zipf": lambda: FeatureChoiceSAE(
        *(D_MODEL, N_FEATURES, K),
        budgets="zipf",
        per_batch=True,
        min_matches=1,
        mutual_choice_tokens=400 * TOKENS,
        dead_after_tokens=50_000,
        **(LAW | BY),
    ),
}


def draw(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return activations (tokens, d_model) and the difficulty of each token."""
    directions = torch.randn(DIRECTIONS, D_MODEL, generator=torch.Generator().manual_seed(99))
    random = torch.Generator().manual_seed(seed)
    law = (torch.arange(1, DIRECTIONS + 1) + 4.0) ** -0.8
    difficulty = torch.tensor([0.3, 1.0, 1.7])[torch.randint(3, (tokens,), generator=random)]
    density = K * law / law.sum() * difficulty.unsqueeze(1)
    on = torch.rand(tokens, DIRECTIONS, generator=random) < density
    strength = 1 + 0.25 * torch.randn(tokens, DIRECTIONS, generator=random)
    return (on * strength) @ functional.normalize(directions, dim=1), difficulty


@pytest.fixture(scope="module")
def trained() -> dict[str, SparseAutoencoder]:
    """All architectures after the same 600 batches."""
    result = {}
    for name, make in MAKE.items():
        torch.manual_seed(0)
        sae = make()
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for step in range(600):
            loss, _ = sae.loss(draw(TOKENS, step)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 600)
            optimizer.step()
            sae.normalize_decoder()
        result[name] = sae
    return result


@torch.no_grad()
def error(sae: SparseAutoencoder, x: Tensor) -> float:
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def test_feature_choice_has_no_dead_feature(trained: dict[str, SparseAutoencoder]):
    for name in ("uniform", "zipf", "measured"):
        sae = trained[name]
        batch = draw(TOKENS, -1)[0]
        # Measured budgets are as small as half a match in it.
        assert name == "measured" or (sae.train().match(batch).per_feature() > 0).all()
        assert (sae.eval().match(draw(16_384, -2)[0]).per_feature() > 0).all()
    assert (trained["mutual"].eval().match(draw(16_384, -2)[0]).per_feature() == 0).any()


def test_zipf_budgets_reconstruct_better_than_uniform_ones(trained: dict[str, SparseAutoencoder]):
    x, _ = draw(8192, -3)
    assert error(trained["zipf"].eval(), x) < 0.9 * error(trained["uniform"].eval(), x)
    assert error(trained["measured"].eval(), x) < 0.9 * error(trained["uniform"].eval(), x)


@pytest.mark.parametrize("name", ["mutual", "uniform", "zipf", "measured"])
def test_thresholds_stand_in_for_the_batch(trained: dict[str, SparseAutoencoder], name: str):
    sae, (x, _) = trained[name], draw(16_384, -4)
    assert sae.eval().match(x).per_token().double().mean() == pytest.approx(K, rel=0.04)
    tolerance = 0.01 if name == "mutual" else 0.05
    assert error(sae.eval(), x) <= (1 + tolerance) * error(sae.train(), x)


def test_hard_tokens_get_more_matches(trained: dict[str, SparseAutoencoder]):
    x, difficulty = draw(8192, -5)
    spread = {}
    for name, sae in trained.items():
        matches = sae.eval().match(x).per_token().double()
        spread[name] = matches.std().item()
        if name != "topk":
            both = torch.stack([matches, difficulty.double()])
            assert torch.corrcoef(both)[0, 1] > 0.4, name
    assert max(spread["topk"], 1.0) < min(spread["mutual"], spread["zipf"])
