"""The units of activations: one scale for all tokens, or one for each."""

import pytest
import torch

from lightning_sae import MutualChoiceSAE, TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.core.input_scaling import ScaledInputs
from lightning_sae.parallel import Ranks
from tests.helpers.architectures import (
    D_MODEL,
    N_FEATURES,
    K,
    activations,
    every_architecture,
    with_importance,
)


def of_many_lengths(tokens: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return activations(tokens) * torch.rand(tokens, 1, generator=generator).mul(6).sub(3).exp()


def measured(normalize_inputs, x: torch.Tensor) -> tuple[ScaledInputs, torch.Tensor]:
    inputs = ScaledInputs(D_MODEL, normalize_inputs)
    return inputs, inputs.measure_inputs(x, Ranks())


@pytest.mark.parametrize("mode", ["average", "token"])
def test_centred_tokens_have_a_mean_square_of_one_a_dimension(mode):
    inputs, origin = measured(mode, activations(1024))
    centred = inputs.scaled(activations(1024)) - origin
    torch.testing.assert_close(centred.square().mean().item(), 1.0, rtol=0.05, atol=0)
    torch.testing.assert_close(centred.mean(0), torch.zeros(D_MODEL).double(), rtol=0, atol=1e-4)


def test_each_token_gets_the_length_of_a_typical_one():
    x = of_many_lengths()
    inputs, _ = measured("token", x)
    scaled = inputs.scaled(x)
    typical = (D_MODEL + (inputs.input_mean * inputs.input_scale).norm() ** 2).sqrt()
    torch.testing.assert_close(scaled.norm(dim=1), typical.expand(len(x)))
    torch.testing.assert_close(
        scaled / scaled.norm(dim=1, keepdim=True), x / x.norm(dim=1)[:, None]
    )


@pytest.mark.parametrize("mode", ["average", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scaling_can_be_undone_in_any_shape(mode, dtype):
    inputs, _ = measured(mode, activations())
    x = activations().to(dtype).view(4, -1, D_MODEL)
    back = inputs.scaled(x) / inputs.scales(x)
    torch.testing.assert_close(back.to(dtype), x)


@with_importance
@pytest.mark.parametrize("importance", ["affinity", "token_norm"])
def test_the_code_of_a_normalised_token_does_not_depend_on_its_length(make, importance):
    sae = make(normalize_inputs="token", importance=importance)
    x = activations(256)
    sae.loss(x)
    longer = x * torch.tensor([0.25, 1.0, 8.0, 512.0]).repeat(64).unsqueeze(1)  # exact in binary
    codes = sae.encode(x)
    assert codes.count_nonzero() > 0
    assert torch.equal(sae.encode(longer) > 0, codes > 0)
    torch.testing.assert_close(sae.encode(longer), codes)
    torch.testing.assert_close(sae(longer), sae(x) * (longer[:, :1] / x[:, :1]))


@every_architecture
def test_codes_are_decoded_to_the_length_of_given_activations(make):
    sae, x = make(normalize_inputs="token"), of_many_lengths()
    sae.loss(x)
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), sae(x))
    torch.testing.assert_close(sae.decode(sae.encode(x), like=-2 * x), 2 * sae(x))
    with pytest.raises(UsageError, match="decode activations of that length too"):
        sae.decode(sae.encode(x))


def test_tokens_of_very_different_lengths_are_learned_alike():
    x = of_many_lengths()
    errors = {}
    for mode in ("average", "token"):
        torch.manual_seed(0)
        sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, normalize_inputs=mode, importance="affinity")
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            sae.loss(x)[0].backward()
            optimizer.step()
            sae.normalize_decoder()
        missing = (x - sae(x)).norm(dim=1) / x.norm(dim=1)
        errors[mode] = missing[x.norm(dim=1) < x.norm(dim=1).median()].median()
    assert errors["token"] < errors["average"] / 2


def test_a_token_zero_comes_back_as_zero():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, normalize_inputs="token")
    x = activations()
    x[3] = 0
    loss, _ = sae.loss(x)
    loss.backward()
    assert sae(x)[3].abs().max() < 1e-9
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_massive_tokens_are_left_out_also_if_each_is_normalised():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, normalize_inputs="token", max_norm_multiple=20.0)
    sae.loss(activations(256))
    x = activations(256)
    x[:3] += 50 * (x - x.mean(0)).square().mean().sqrt()
    _, stats = sae.loss(x)
    torch.testing.assert_close(stats["massive_fraction"].item(), 3 / 256)
    assert sae.tokens_seen == 2 * 256 - 3


def test_there_are_two_ways():
    with pytest.raises(UsageError, match="normalize_inputs='layer' is none of average, token"):
        TopKSAE(D_MODEL, N_FEATURES, K, normalize_inputs="layer")
