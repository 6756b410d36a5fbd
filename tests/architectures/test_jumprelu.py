"""JumpReLU: against its formulas over all tokens x features, in value and gradient."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae import JumpReLUSAE, UsageError
from tests.helpers.architectures import D_MODEL, N_FEATURES, activations, affinities, train
from tests.helpers.superposition import superposition

BANDWIDTH = 0.3


class _Jump(torch.autograd.Function):
    """The source's pseudo-derivative of z H(z - t), or of H(z - t), by all pairs."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, width: float, of_step: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width, ctx.of_step = width, of_step
        fires = (z > threshold).to(z)
        return fires if of_step else z * fires

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, threshold = ctx.saved_tensors
        # A pair without a positive affinity never counts: the source takes a ReLU of them first.
        near = (((z - threshold).abs() < ctx.width / 2) & (z > 0)).to(z)
        height = 1.0 if ctx.of_step else threshold
        to_z = None if ctx.of_step else grad * (z > threshold)
        return to_z, (-height / ctx.width * near * grad).sum(0), None, None


def dense_loss(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    """The loss of a batch, written out."""
    scaled = sae.scaled(x)
    unit = math.sqrt(sae.d_model)
    threshold, width = sae.unit_threshold * unit, sae.bandwidth * unit
    z = affinities(sae, scaled)
    codes = _Jump.apply(z, threshold, width, False)
    error = scaled - codes @ functional.normalize(sae.W_dec, dim=1) - sae.b_dec
    if sae.penalty == "l0":
        penalty = _Jump.apply(z, threshold, width, True).sum()
    else:
        penalty = torch.tanh(4 * codes).sum()
    pre_act = (threshold - z).relu().sum() / sae.d_model
    weights = sae.penalty_weight.weight, sae.pre_act_coefficient
    return error.square().mean() + (weights[0] * penalty + weights[1] * pre_act) / len(x)


def gradients(sae: JumpReLUSAE, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("pre_act_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("penalty", ["l0", "tanh"])
@pytest.mark.parametrize("k", [2, 16])  # few matches, gathered, and many, as dense products
def test_value_and_gradient_are_those_of_the_formulas(penalty, k: int, pre_act_coefficient: float):
    torch.manual_seed(0)
    sae = JumpReLUSAE(
        *(8, 64, k),
        bandwidth=BANDWIDTH,
        penalty=penalty,
        pre_act_coefficient=pre_act_coefficient,
    ).double()
    x = superposition(96, 8, n_features=16, seed=0).double()
    sae.loss(x)  # so that thresholds are known
    with torch.no_grad():
        sae.unit_threshold.mul_(torch.rand(64) + 0.5)
        sae.encoder.bias.normal_(std=0.1)
    expected = dense_loss(sae, x)
    expected_gradients = gradients(sae, expected)
    loss, stats = sae.loss(x)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert stats["l0"] < len(sae.choose(sae.scores(sae.scaled(x))).matches) / len(x)
    for name, gradient in gradients(sae, loss).items():
        scale = expected_gradients[name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-12 * scale)


def test_thresholds_begin_where_the_first_batch_has_k_matches_a_token():
    torch.manual_seed(0)
    sae = JumpReLUSAE(8, 64, 3)
    with pytest.raises(UsageError, match="threshold of JumpReLUSAE is not calibrated"):
        sae.encode(torch.zeros(1, 8))
    _, stats = sae.loss(superposition(128, 8, n_features=16, seed=0))
    assert stats["l0"].item() == pytest.approx(3, abs=0.02)
    assert len(sae.unit_threshold.unique()) == 1


@pytest.mark.parametrize("k", [2, 8])
def test_a_run_has_k_matches_without_a_sweep(k: int):
    torch.manual_seed(0)
    sae = JumpReLUSAE(D_MODEL, N_FEATURES, k, bandwidth=0.05)
    train(sae, 300)
    assert sae.unit_threshold.std() > 0.01  # each its own by now
    held_out = activations(4096)
    assert len(sae.match(held_out)) / 4096 == pytest.approx(k, rel=0.1)
    ratios = sae.unit_threshold.detach().clone()
    sae.calibrate(held_out)
    assert len(sae.match(held_out)) == k * 4096
    ratios = sae.unit_threshold / ratios
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))  # one factor for all


def test_thresholds_stay_positive_and_keep_their_bits():
    torch.manual_seed(0)
    sae = JumpReLUSAE(8, 64, 3).to(torch.bfloat16)
    assert sae.unit_threshold.dtype == torch.float32
    sae.loss(torch.randn(64, 8).bfloat16())[0].backward()
    assert sae.unit_threshold.grad.dtype == torch.float32
    with torch.no_grad():
        sae.unit_threshold[0] = -1.0
    sae.normalize_decoder()
    assert sae.unit_threshold.min() > 0


def test_what_fires_in_training_is_what_fires_at_inference():
    torch.manual_seed(0)
    sae = JumpReLUSAE(8, 64, 3, bandwidth=BANDWIDTH)
    x = superposition(128, 8, n_features=16, seed=0)
    sae.loss(x)
    codes = sae.encode(x)
    assert sae.loss(x)[1]["l0"] == (codes > 0).sum() / len(x)
    assert (codes[codes > 0] > sae.threshold.min()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be a finite number, more than 0"),
        ({"penalty": "l1"}, "penalty='l1' is none of l0, tanh"),
        ({"pre_act_coefficient": -1.0}, "pre_act_coefficient=-1.0 must be a finite number"),
        ({"k": 65}, "k=65 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict, message: str):
    with pytest.raises(UsageError, match=message):
        JumpReLUSAE(8, 64, **({"k": 3} | arguments))


def test_thresholds_that_no_training_leads_to_are_refused():
    sae = JumpReLUSAE(8, 64, 3)
    sae.load_state_dict(sae.state_dict())  # those of an SAE before its first batch
    state = sae.state_dict()
    state["unit_threshold"] = torch.linspace(-1, 1, 64)
    with pytest.raises(UsageError, match="unit_threshold=-1 in the state to load"):
        sae.load_state_dict(state)
