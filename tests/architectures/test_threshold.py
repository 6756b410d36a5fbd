"""Thresholds that stand in for the batch, on the architecture that has one for all features."""

import pytest
import torch

from lightning_sae import MutualChoiceSAE
from tests.helpers.architectures import chosen
from tests.helpers.superposition import superposition


def test_the_threshold_follows_the_smallest_choice_and_keeps_the_budget():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, k=3, normalize_inputs="average")
    x = superposition(128, 8, n_features=16, seed=0)
    sae.loss(x)
    smallest = chosen(sae, x).value.min()
    torch.testing.assert_close(sae.threshold, smallest.detach())
    for _ in range(3):
        sae.loss(x)
    sae.eval()
    assert (sae.encode(x) > 0).sum().item() / 128 == pytest.approx(3, rel=0.01)


def test_the_threshold_is_a_running_average():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, k=3, normalize_inputs="average")
    batches = [superposition(128, 8, n_features=16, seed=seed) * (1 + seed) for seed in range(2)]
    sae.loss(batches[0])
    first = sae.threshold.clone()
    sae.loss(batches[1])
    second = chosen(sae, batches[1]).value.min()
    assert second > 1.2 * first
    torch.testing.assert_close(sae.threshold, (0.9 * first + 0.1 * second).detach())


def test_an_uncalibrated_threshold_is_refused():
    sae = MutualChoiceSAE(8, 24, k=3)
    with pytest.raises(ValueError, match="threshold of MutualChoiceSAE is not calibrated"):
        sae.encode(torch.randn(2, 8))


@pytest.mark.parametrize("k", [0, -1, 25])
def test_k_out_of_range(k: int):
    with pytest.raises(ValueError, match=f"k={k} is out of range: it must be 1 to n_features=24"):
        MutualChoiceSAE(8, 24, k=k)


def test_calibration_takes_tokens():
    sae = MutualChoiceSAE(8, 24, k=3)
    with pytest.raises(ValueError, match="calibrate takes activations of at least one token"):
        sae.calibrate(torch.zeros(0, 8))


def test_tokens_that_training_leaves_out_have_no_part_in_calibration():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, k=3, importance="affinity", max_norm_multiple=8.0)
    x = superposition(512, 8, n_features=16, seed=0)
    sae.loss(x)
    sae.calibrate(x)
    expected = sae.threshold.clone()
    massive = x[:8] + 1000
    sae.calibrate(torch.cat([massive, x]))
    assert sae.threshold == expected
    with pytest.raises(ValueError, match="calibrate takes activations of at least one token"):
        sae.calibrate(massive)


def test_calibration_gives_k_matches_a_token_on_these_tokens():
    sae = MutualChoiceSAE(8, 24, k=3)
    sae.loss(superposition(64, 8, n_features=16, seed=0))
    held_out = superposition(3000, 8, n_features=16, seed=1)
    sae.calibrate(held_out)
    assert (sae.eval().encode(held_out) > 0).sum() == 3 * 3000
