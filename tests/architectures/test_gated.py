"""Gated: against its formulas over all tokens x features, in value and gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae import GatedSAE, TopKSAE, UsageError
from tests.helpers.architectures import D_MODEL, N_FEATURES, activations, affinities, train
from tests.helpers.superposition import superposition


def dense_codes(sae: GatedSAE, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and codes, written out with an encoder of each, as the source has them."""
    gates = (scaled - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    return gates, (gates > 0) * dense_magnitudes(sae, scaled)


def dense_magnitudes(sae: GatedSAE, scaled: Tensor) -> Tensor:
    shared = (scaled - sae.b_dec) @ sae.encoder.weight.T
    return functional.relu(shared * sae.log_gain.exp() + sae.magnitude_bias)


def dense_loss(sae: GatedSAE, x: Tensor) -> Tensor:
    scaled = sae.scaled(x)
    gates, codes = dense_codes(sae, scaled)
    directions = functional.normalize(sae.W_dec, dim=1)
    error = scaled - codes @ directions - sae.b_dec
    frozen = gates.relu() @ directions.detach() + sae.b_dec.detach()
    penalty = gates.relu().sum() / len(x) / sae.d_model
    weight = sae.penalty_weight.weight.clone()
    return error.square().mean() + (scaled - frozen).square().mean() + weight * penalty


def of_many_kinds(k: int) -> GatedSAE:
    """One whose features have other gains and biases, some of codes that are not positive."""
    torch.manual_seed(0)
    sae = GatedSAE(8, 64, k).double()
    sae.loss(superposition(96, 8, n_features=16, seed=0).double())
    with torch.no_grad():
        for each in (sae.log_gain, sae.magnitude_bias):
            each.normal_(std=0.3)
        sae.magnitude_bias[:8] = -1.5
        sae.encoder.bias.add_(0.1 * torch.randn(64))
    return sae


@pytest.mark.parametrize("k", [2, 16])  # few matches, gathered, and many, as dense products
def test_value_and_gradient_are_those_of_the_formulas(k: int):
    sae, x = of_many_kinds(k), superposition(96, 8, n_features=16, seed=1).double()
    names, parameters = zip(*sae.named_parameters(), strict=True)
    expected = dense_loss(sae, x)
    expected_gradients = torch.autograd.grad(expected, parameters)
    loss, _ = sae.loss(x)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, theirs, ours in zip(
        names, expected_gradients, torch.autograd.grad(loss, parameters), strict=True
    ):
        scale = theirs.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_codes_are_those_of_the_formulas_and_only_those_above_zero_fire():
    sae, x = of_many_kinds(4), superposition(256, 8, n_features=16, seed=1).double()
    gates, codes = dense_codes(sae, sae.scaled(x))
    torch.testing.assert_close(sae.encode(x), codes)
    assert (codes > 0).sum() < (gates > 0).sum()
    assert sae.loss(x)[1]["l0"].item() == pytest.approx((codes > 0).sum().item() / len(x))


def test_gates_begin_where_the_first_batch_has_k_matches_a_token():
    torch.manual_seed(0)
    sae = GatedSAE(8, 64, 3)
    x = superposition(128, 8, n_features=16, seed=0)
    _, stats = sae.loss(x)
    assert stats["l0"].item() == pytest.approx(3, abs=0.02)
    codes = sae.encode(x)  # and with the codes of an encoder without gates
    expected = affinities(sae, sae.scaled(x)) - sae.encoder.bias
    torch.testing.assert_close(codes, torch.where(codes > 0, expected, 0.0))


def test_it_takes_over_the_codes_of_another():
    torch.manual_seed(0)
    topk = TopKSAE(8, 64, 3, normalize_inputs="average")
    x = superposition(128, 8, n_features=16, seed=0)
    topk.loss(x)
    with torch.no_grad():
        topk.encoder.bias.normal_(std=0.2)
    sae = GatedSAE(8, 64, 3)
    sae.take_over(topk.state_dict())
    sae.loss(x)
    both = (topk.encode(x) > 0) & (sae.encode(x) > 0)
    assert both.sum() > 128
    torch.testing.assert_close(sae.encode(x)[both], topk.encode(x)[both])


@pytest.mark.parametrize("k", [2, 8])
def test_a_run_has_k_matches_without_a_sweep(k: int):
    torch.manual_seed(0)
    sae = GatedSAE(D_MODEL, N_FEATURES, k)
    train(sae, 300)
    assert sae.threshold.std() > 0.01  # each its own by now
    assert len(sae.match(activations(4096))) / 4096 == pytest.approx(k, rel=0.15)


def test_its_k_is_one_that_it_can_have():
    with pytest.raises(UsageError, match="k=65 is out of range"):
        GatedSAE(8, 64, 65)


@pytest.mark.parametrize("moved", [-0.5, 0.0, 0.5])  # gates that are open too seldom, and too often
def test_calibration_opens_all_gates_by_one_number_for_k_codes_a_token(moved: float):
    sae = of_many_kinds(4).eval()
    with torch.no_grad():
        sae.encoder.bias.add_(moved)
    x = superposition(500, 8, n_features=16, seed=2).double()
    before = sae.encoder.bias.clone()
    gates, magnitudes = dense_codes(sae, sae.scaled(x))[0], dense_magnitudes(sae, sae.scaled(x))
    sae.calibrate(x)
    assert (sae.encode(x) > 0).sum() == 4 * 500
    shift = sae.encoder.bias - before
    torch.testing.assert_close(shift, shift[:1].expand(64))
    largest = gates[magnitudes > 0].sort(descending=True).values
    assert largest[2000] < -shift[0] < largest[1999]
    codes = ((gates + shift > 0) * magnitudes).detach()  # which are as they were
    torch.testing.assert_close(sae.encode(x), codes)


def test_calibration_leaves_gates_alone_that_cannot_be_open_for_so_many():
    sae = of_many_kinds(60).eval()
    before = sae.encoder.bias.clone()
    sae.calibrate(superposition(100, 8, n_features=16, seed=2).double())
    assert torch.equal(sae.encoder.bias, before)
    with pytest.raises(UsageError, match="at least one token"):
        sae.calibrate(torch.zeros(0, 8).double())
