"""Attributions against dense autograd, ablations, and sums that must come out."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from lightning_sae import ResidualStream
from lightning_sae.interventions import ablate, attribute, splice
from tests.helpers.architectures import ARCHITECTURES, D_MODEL
from tests.helpers.language_models import LAYERS
from tests.interventions.tiny import FAMILIES, LAYER, ids_of, kept_of, model_of, sae_of

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@pytest.fixture(params=FAMILIES)
def stream(request):
    return ResidualStream(model_of(request.param), LAYER)


def difference(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


def dense(stream, sae, ids, metric, mask=None):
    """Codes and errors times their gradients, as dense tensors through the whole model."""
    kept = kept_of(ids, mask)
    x = stream.read(ids, mask)[kept].float()
    codes = sae.encode(x).detach().requires_grad_()
    error = (x - sae(x)).detach().requires_grad_()
    scales = sae.scales(x)
    directions = functional.normalize(sae.decoder.weight.detach(), dim=1)

    def edit(old):
        new = old.clone()
        new[kept] = (codes @ directions + sae.b_dec.detach()) / scales + error
        return new

    metric(stream.replace(ids, edit, mask)).backward()
    whole = torch.zeros(*ids.shape, sae.n_features)
    whole[kept] = codes.detach() * codes.grad
    rest = torch.zeros(ids.shape)
    rest[kept] = (error.detach() * error.grad).sum(1)
    return whole, rest


@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_dense_autograd_says(architecture, normalize_inputs):
    stream = ResidualStream(model_of("llama"), LAYER)
    sae = sae_of(stream, architecture, normalize_inputs=normalize_inputs)
    ids = ids_of()
    ids[1, 3] = 0
    found = attribute(stream, sae, ids, difference)
    whole, rest = dense(stream, sae, ids, difference)
    assert found.matches.shape == (14, sae.n_features)
    of_all = found.matches.to_dense(found.of_matches).view(whole.shape)
    torch.testing.assert_close(of_all, whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.of_error, rest, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.of_features(), whole.sum((0, 1)), rtol=1e-3, atol=1e-4)
    assert torch.equal(
        whole[found.context, found.position, found.matches.feature] != 0, found.of_matches != 0
    )
    assert torch.equal(found.matches.value > 0, torch.ones_like(found.matches.value).bool())


def test_padding_and_a_loss(stream):
    sae, ids = sae_of(stream), ids_of()

    def loss(logits):
        real = MASK[:, 1:].bool() & MASK[:, :-1].bool()
        return functional.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])

    found = attribute(stream, sae, ids, loss, attention_mask=MASK)
    whole, rest = dense(stream, sae, ids, loss, MASK)
    of_all = found.matches.to_dense(found.of_matches).view(whole.shape)
    torch.testing.assert_close(of_all, whole, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.of_error, rest, rtol=1e-3, atol=1e-5)


class Linear(nn.Module):
    """What a model has in place of a norm, for its logits to be linear in its last layer."""

    def forward(self, x):
        return x


@pytest.fixture(params=FAMILIES)
def linear(request):
    model = model_of(request.param)
    if request.param == "gpt2":
        model.transformer.ln_f = Linear()
    else:
        model.model.norm = Linear()
    return ResidualStream(model, LAYERS - 1)


def test_of_what_is_linear_it_is_what_ablating_takes_away(linear):
    sae, ids = sae_of(linear), ids_of()

    @torch.no_grad()
    def value():
        return difference(linear.model(ids).logits)

    found, clean = attribute(linear, sae, ids, difference), value()
    of_features = found.of_features()
    for feature in of_features.abs().topk(3).indices.tolist():
        with ablate(linear, sae, [feature]):
            assert clean - value() == pytest.approx(of_features[feature].item(), rel=1e-3, abs=1e-3)
    one = int(found.of_matches.abs().argmax())
    here = torch.zeros(2, 7, dtype=torch.bool)
    here[found.context[one], found.position[one]] = True
    with ablate(linear, sae, [int(found.matches.feature[one])], where=here):
        assert clean - value() == pytest.approx(found.of_matches[one].item(), rel=1e-3, abs=1e-3)
    with splice(linear, sae):
        assert clean - value() == pytest.approx(found.of_error.sum().item(), rel=1e-3, abs=1e-3)


@torch.no_grad()
def with_the_origin_alone(stream, sae, ids):
    kept = kept_of(ids)

    def edit(x):
        new = x.clone()
        new[kept] = sae.decode(torch.zeros(len(x[kept]), sae.n_features), like=x[kept])
        return new

    return difference(stream.replace(ids, edit))


def test_contributions_add_up(linear):
    sae, ids = sae_of(linear), ids_of()
    found = attribute(linear, sae, ids, difference)
    total = found.of_matches.sum() + found.of_error.sum()
    change = difference(linear.model(ids).logits) - with_the_origin_alone(linear, sae, ids)
    torch.testing.assert_close(total, change, rtol=1e-3, atol=1e-3)


def test_those_of_many_steps_add_up_for_any_metric(stream):
    sae, ids = sae_of(stream), ids_of()
    change = difference(stream.model(ids).logits) - with_the_origin_alone(stream, sae, ids)
    off = []
    for steps in (1, 8, 64):
        found = attribute(stream, sae, ids, difference, steps=steps)
        off.append(((found.of_matches.sum() + found.of_error.sum() - change) / change).abs().item())
    assert off[2] < 0.01
    assert off[2] < off[0]


def test_only_tokens_that_are_named(stream):
    sae, ids = sae_of(stream), ids_of()
    where = torch.zeros(1, 7, dtype=torch.bool)
    where[0, 4] = True
    found, whole = (attribute(stream, sae, ids, difference, where=each) for each in (where, None))
    assert (found.position == 4).all()
    here = whole.position == 4
    torch.testing.assert_close(found.of_matches, whole.of_matches[here])
    torch.testing.assert_close(found.of_error[:, 4], whole.of_error[:, 4])
    assert not found.of_error[:, :4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(stream, dtype):
    sae, ids = sae_of(stream), ids_of()
    expected = attribute(stream, sae, ids, difference).of_features()
    stream.model.to(dtype)
    found = attribute(stream, sae, ids, difference).of_features()
    exact = 0.1 if dtype == torch.bfloat16 else 1e-3
    assert (found - expected).norm() < exact * expected.norm()


def test_within_another_intervention(stream):
    sae, ids = sae_of(stream), ids_of()
    top = attribute(stream, sae, ids, difference).of_features().abs().argmax().item()
    early = ResidualStream(stream.model, 0)
    other = sae_of(early)
    with splice(early, other):
        found = attribute(stream, sae, ids, difference)
        codes = sae.match(stream.read(ids)[kept_of(ids)])
    torch.testing.assert_close(found.matches.value, codes.value)
    with ablate(stream, sae, [top]):
        with torch.no_grad():
            edited = stream.read(ids)
        found = attribute(stream, sae, ids, difference)
    torch.testing.assert_close(found.matches.value, sae.match(edited[kept_of(ids)]).value)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_whatever_mode_it_is_called_in_it_leaves_no_gradient_behind(stream, guard):
    sae, ids = sae_of(stream), ids_of()
    stream.model.requires_grad_()
    expected = attribute(stream, sae, ids, difference).of_matches
    with guard():
        found = attribute(stream, sae, ids, difference).of_matches
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    everything = [*stream.model.parameters(), *sae.parameters()]
    assert all(parameter.grad is None for parameter in everything)


def test_patches_of_images():
    torch.manual_seed(0)
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=12, patch_size=4)
    stream = ResidualStream(ViTForImageClassification(config).eval(), LAYER)
    pixels = torch.randn(2, 3, 12, 12)
    sae = ARCHITECTURES["topk"]()
    sae.loss(stream.read(pixels)[:, 1:])
    found = attribute(stream, sae, pixels, lambda logits: logits[:, 0].sum())
    assert found.of_error.shape == (2, 10)
    assert not found.of_error[:, 0].any()
    assert found.of_error[:, 1:].all()
    assert found.of_matches.any()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits: logits[:, -1, 0], r"^metric of shape \(2,\): it must be one number"),
        (lambda logits: torch.ones(()), r"^metric of shape \(\): it must be one number that dep"),
    ],
)
def test_metrics_that_are_none(stream, metric, message):
    with pytest.raises(ValueError, match=message):
        attribute(stream, sae_of(stream), ids_of(), metric)
