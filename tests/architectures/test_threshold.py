"""Thresholds that stand in for the batch, on the architecture that has one for all features."""

import pytest
import torch

from lightning_sae import MutualChoiceSAE
from lightning_sae.core.gate import Gate
from tests.helpers.architectures import chosen
from tests.helpers.superposition import superposition

every_discount = pytest.mark.parametrize("rank_discount", [0.0, 1.0])


def smallest_choice(sae: MutualChoiceSAE, x: torch.Tensor) -> torch.Tensor:
    matches = chosen(sae, x)
    values = matches.value.detach()
    return (sae.discount(matches.token, values) if sae.discount else values).min()


@every_discount
def test_the_threshold_follows_the_smallest_choice_and_keeps_the_budget(rank_discount: float):
    torch.manual_seed(0)
    options = {"rank_discount": rank_discount, "normalize_inputs": "average"}
    sae = MutualChoiceSAE(8, 24, k=3, **options)
    x = superposition(128, 8, n_features=16, seed=0)
    sae.loss(x)
    torch.testing.assert_close(sae.threshold, smallest_choice(sae, x))
    for _ in range(3):
        sae.loss(x)
    sae.eval()
    assert (sae.encode(x) > 0).sum().item() / 128 == pytest.approx(3, rel=0.01)


@every_discount
def test_the_threshold_is_a_running_average(rank_discount: float):
    torch.manual_seed(0)
    options = {"rank_discount": rank_discount, "normalize_inputs": "average"}
    sae = MutualChoiceSAE(8, 24, k=3, **options)
    batches = [superposition(128, 8, n_features=16, seed=seed) * (1 + seed) for seed in range(2)]
    sae.loss(batches[0])
    first = sae.threshold.clone()
    sae.loss(batches[1])
    second = smallest_choice(sae, batches[1])
    assert second > 1.2 * first
    torch.testing.assert_close(sae.threshold, 0.9 * first + 0.1 * second)


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


@every_discount
def test_calibration_gives_k_matches_a_token_on_these_tokens(rank_discount: float):
    torch.manual_seed(1)
    sae = MutualChoiceSAE(8, 24, k=3, rank_discount=rank_discount)
    sae.loss(superposition(64, 8, n_features=16, seed=0))
    held_out = superposition(3000, 8, n_features=16, seed=1)
    held_out += 0.01 * torch.randn(3000, 8)  # of tokens that are alike all or none would match
    sae.calibrate(held_out)
    assert (sae.eval().encode(held_out) > 0).sum() == 3 * 3000


def test_without_its_discount_an_sae_has_as_many_matches_and_a_gate():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, k=3)
    x = superposition(3000, 8, n_features=16, seed=1)
    sae.loss(x)
    sae.record = {"trained_on": {"layer": 2}, "measured": {"fvu": 0.1}}
    assert sae.gate().discount == sae.discount
    plain = sae.without_discount(x)
    assert plain.hparams["rank_discount"] == 0
    assert plain.gate() == Gate(threshold=plain.threshold)
    assert len(plain.match(x)) == 3 * 3000
    assert plain.record["trained_on"] == {"layer": 2}
    fvu = ((x - plain(x)).square().mean() / (x - x.mean(0)).square().mean()).item()
    measured = {"tokens_seen": 3000, "l0": 3.0, "fvu": pytest.approx(fvu, rel=1e-4)}
    assert plain.record["measured"] == measured
    torch.testing.assert_close(plain.W_dec, sae.W_dec)
    assert sae.record["measured"] == {"fvu": 0.1}
    assert sae.rank_discount == 1
    assert plain.match(x).per_token().float().std() > sae.match(x).per_token().float().std()
