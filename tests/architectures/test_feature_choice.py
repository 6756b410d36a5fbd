"""Feature Choice: every feature spends its own budget, so none is dead."""

import pytest
import torch

from lightning_sae import FeatureChoiceSAE
from tests.helpers.superposition import superposition


def test_uniform_budgets_give_every_feature_the_same():
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(8, 24, k=3, budgets="uniform")
    x = superposition(128, 8, n_features=16, seed=0)
    _, stats = sae.loss(x)
    assert torch.equal((sae.encode(x) > 0).sum(0), torch.full((24,), 16))  # 3 * 128 / 24
    assert stats["l0"] == 3


def test_zipf_budgets_fall_with_rank_and_sum_to_k_a_token():
    sae = FeatureChoiceSAE(8, 24, k=3, budgets="zipf", max_density=0.4)
    budgets = sae.budgets_for(128)
    assert budgets.sum().item() == pytest.approx(3 * 128)
    assert (budgets.diff() <= 0).all()
    assert budgets.min() >= 1
    assert budgets.max() <= 0.4 * 128 + 1e-9
    assert budgets[0] > 2 * budgets[-1]


def test_fractions_of_a_match_are_rounded_anew_in_every_batch():
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(8, 24, k=3, budgets="zipf")
    x = superposition(100, 8, n_features=16, seed=0)
    counts = []
    for _ in range(6):
        sae.loss(x)
        counts.append(sae.match(x).per_feature())
    assert len({tuple(count.tolist()) for count in counts}) > 1
    # The two largest budgets find too few positive affinities to spend themselves on.
    assert ((torch.stack(counts) - sae.budgets_for(100))[:, 2:].abs() < 1).all()


def test_every_feature_fires_in_every_batch():
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(8, 24, k=2, budgets="zipf")
    for seed in range(5):
        x = superposition(64, 8, n_features=16, seed=seed)
        sae.loss(x)
        assert (sae.tokens_since_fired == 0).all()


def test_thresholds_keep_each_features_share():
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(8, 24, k=3, budgets="zipf")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(300):
        loss, _ = sae.loss(superposition(512, 8, n_features=16, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
    assert sae.threshold.shape == (24,)
    sae.eval()
    density = (sae.encode(superposition(8192, 8, n_features=16, seed=-1)) > 0).double().mean(0)
    assert density.sum().item() == pytest.approx(3, rel=0.15)
    wanted = sae.budgets_for(512) / 512
    assert torch.corrcoef(torch.stack([density.log(), wanted.log()]))[0, 1] > 0.9


def test_a_budget_too_small_for_the_dictionary_is_explained():
    sae = FeatureChoiceSAE(8, 1000, k=2)
    with pytest.raises(
        ValueError, match="n_features=1000 features one match: batch_size=500 or more can"
    ):
        sae.loss(torch.randn(128, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_density": 1.5}, r"max_density=1\.5 is out of range"),
        ({"max_density": 0.05}, r"k=2 matches need at least k / n_features = 0\.0833"),
        ({"budgets": "Zipf"}, "budgets='Zipf' is neither"),
        ({"zipf_exponent": -1.0}, r"zipf_exponent=-1\.0 must be a finite number"),
        ({"zipf_offset": float("nan")}, "zipf_offset=nan must be a finite number"),
    ],
)
def test_settings_out_of_range(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FeatureChoiceSAE(8, 24, k=2, **arguments)
