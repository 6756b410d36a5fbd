from functools import partial

import pytest
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from lightning_sae import ResidualStream, interop
from lightning_sae.interventions import ablate, clamp, splice, steer
from tests.helpers.architectures import ARCHITECTURES, D_MODEL
from tests.helpers.language_models import LAYERS
from tests.interventions.tiny import FAMILIES, LAYER, busiest, ids_of, kept_of, model_of, sae_of


@pytest.fixture(params=FAMILIES)
def stream(request):
    return ResidualStream(model_of(request.param), LAYER)


@pytest.fixture
def ids():
    ids = ids_of()
    ids[1, 3] = 0
    return ids


def expected_of(sae, x, kept, *, taken=(), given=None, error=True):
    """What is to become of activations (contexts, length, d_model), by dense codes, by hand."""
    new = x.double()
    directions = functional.normalize(sae.decoder.weight.detach().double(), dim=1)
    for at in kept.nonzero().tolist():
        old = x[tuple(at)].float()
        codes = sae.encode(old[None])[0].double()
        scale = sae.scales(old[None]).double().reshape(())
        base = old.double() if error else sae(old[None])[0].double()
        change = torch.zeros_like(codes)
        for feature in taken:
            change[feature] -= codes[feature]
        for feature, value in (given or {}).items():
            change[feature] += value
        new[tuple(at)] = base + change @ directions / scale
    return new


def edited_states(stream, ids, *managers, **options):
    """The stream where it leaves the layer, in managers entered one after the other."""
    if managers:
        with managers[0]:
            return edited_states(stream, ids, *managers[1:], **options)
    with torch.no_grad():
        return stream.model(ids, output_hidden_states=True, **options).hidden_states[LAYER + 1]


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_do_what_dense_codes_say(architecture, normalize_inputs, ids):
    stream = ResidualStream(model_of("llama"), LAYER)
    sae = sae_of(stream, architecture, normalize_inputs=normalize_inputs)
    x, kept = stream.read(ids), kept_of(ids)
    some = busiest(sae, x[kept])
    values = {some[0]: 3.5, 7: -1.0}
    cases = [
        (splice(stream, sae), {"error": False}),
        (splice(stream, sae, error=True), {}),
        (ablate(stream, sae, some), {"taken": some}),
        (ablate(stream, sae, some, error=False), {"taken": some, "error": False}),
        (clamp(stream, sae, values), {"taken": values, "given": values}),
        (
            clamp(stream, sae, values, error=False),
            dict.fromkeys(["taken", "given"], values) | {"error": False},
        ),
        (steer(stream, sae, values), {"given": values}),
        (steer(stream, sae, values, error=False), {"given": values, "error": False}),
    ]
    _, before = edited_states(stream, ids), hooks_of(stream.model)  # transformers leaves its own
    for manager, settings in cases:
        found = edited_states(stream, ids, manager)
        expected = expected_of(sae, x, kept, **settings)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[~kept], x[~kept])
        changes = settings != {}
        assert torch.equal(found, x) != changes
    assert hooks_of(stream.model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_to_change_leaves_the_logits_bit_for_bit(stream, ids, dtype):
    sae = sae_of(stream)
    model = stream.model.to(dtype)
    clean = model(ids).logits
    for manager in (
        ablate(stream, sae, []),
        ablate(
            stream, sae, [int(sae.match(stream.read(ids)[kept_of(ids)]).per_feature().argmin())]
        ),
        steer(stream, sae, {3: 0.0}),
        clamp(stream, sae, {}),
        splice(stream, sae, error=True),
        splice(stream, sae, where=torch.zeros(1, 7, dtype=torch.bool)),
    ):
        with manager:
            assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(stream, ids, dtype):
    sae = sae_of(stream)
    stream.model.to(dtype)
    x, kept = stream.read(ids), kept_of(ids)
    some = busiest(sae, x[kept].float())
    found = edited_states(stream, ids, ablate(stream, sae, some))
    assert found.dtype == dtype
    expected = expected_of(sae, x, kept, taken=some)
    exact = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=exact, atol=4 * exact)
    assert torch.equal(found[~kept], x[~kept])


def test_logits_are_those_of_what_was_put_in(stream, ids):
    sae = sae_of(stream)
    kept = kept_of(ids)

    def edit(x):
        new = x.clone()
        new[kept] = sae(x[kept])
        return new

    with splice(stream, sae), torch.no_grad():
        spliced = stream.model(ids).logits
    torch.testing.assert_close(spliced, stream.replace(ids, edit), rtol=1e-5, atol=1e-5)


def test_edits_of_one_layer_act_in_the_order_in_which_they_were_entered(stream, ids):
    sae = sae_of(stream)
    x, kept = stream.read(ids), kept_of(ids)
    (one,) = busiest(sae, x[kept], 1)
    steered, ablated = partial(steer, stream, sae, {one: 5.0}), partial(ablate, stream, sae, [one])
    first = expected_of(sae, x, kept, given={one: 5.0}).float()
    found = edited_states(stream, ids, steered(), ablated())
    expected = expected_of(sae, first, kept, taken=[one])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    first = expected_of(sae, x, kept, taken=[one]).float()
    found = edited_states(stream, ids, ablated(), steered())
    expected = expected_of(sae, first, kept, given={one: 5.0})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_saes_of_two_layers_at_once(stream, ids):
    early = ResidualStream(stream.model, 0)
    saes = sae_of(early), sae_of(stream)
    kept = kept_of(ids)

    def edit(sae, x):
        new = x.clone()
        new[kept] = sae(x[kept])
        return new

    with early.editing(partial(edit, saes[0])):
        expected = stream.replace(ids, partial(edit, saes[1]))
    for managers in ([early, stream], [stream, early]):
        one, two = (splice(each, saes[0 if each is early else 1]) for each in managers)
        with one, two, torch.no_grad():
            found = stream.model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_them(stream, ids):
    sae = sae_of(stream)
    embedded = stream.model.get_input_embeddings()(ids).detach().requires_grad_()
    some = busiest(sae, stream.read(ids)[kept_of(ids)])
    grads = []
    for manager in (ablate(stream, sae, []), ablate(stream, sae, some), splice(stream, sae)):
        with manager:
            stream.model(inputs_embeds=embedded).logits[:, -1, :9].sum().backward()
        grads.append((embedded.grad.clone(), sae.decoder.weight.grad))
        embedded.grad = sae.decoder.weight.grad = None
    assert all(bool(each.isfinite().all()) and bool(each.any()) for each, _ in grads)
    assert not torch.equal(grads[0][0], grads[1][0])
    assert grads[2][1].any()  # an SAE can be trained by what it does to the model


def test_nothing_stays_on_the_model_after_an_error(stream, ids):
    sae = sae_of(stream)
    clean, before = stream.model(ids).logits, hooks_of(stream.model)
    with pytest.raises(KeyError), steer(stream, sae, {0: 9.0}):
        raise KeyError
    with pytest.raises((IndexError, RuntimeError)), steer(stream, sae, {0: 9.0}):
        stream.model(ids + 50)
    untrained = ARCHITECTURES["mutual_choice"]()
    with pytest.raises(ValueError, match="threshold of MutualChoiceSAE"), splice(stream, untrained):
        stream.model(ids)
    assert hooks_of(stream.model) == before
    assert torch.equal(stream.model(ids).logits, clean)


def test_they_are_right_after_a_run_that_failed(stream, ids):
    sae = sae_of(stream)
    with steer(stream, sae, {0: 9.0}):
        expected = stream.model(ids).logits
    with steer(stream, sae, {0: 9.0}):
        with pytest.raises((IndexError, RuntimeError)):
            stream.model(ids + 50, attention_mask=torch.zeros_like(ids))
        ResidualStream(stream.model, 0).read(ids)  # leaves the model half way
        assert torch.equal(stream.model(ids).logits, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, sae: ablate(s, sae, [48]), r"^feature 48 is none of n_features=48$"),
        (lambda s, sae: steer(s, sae, {-1: 1.0}), r"^feature -1 is none of n_features=48$"),
        (lambda s, sae: clamp(s, sae, {2: float("nan")}), r"^feature 2=nan must be a finite"),
        (lambda s, sae: splice(s, sae, where=torch.ones(7)), r"^where of shape \(7,\) and torch.f"),
    ],
)
def test_mistakes(stream, make, message):
    sae, before = sae_of(stream), hooks_of(stream.model)
    with pytest.raises(ValueError, match=message), make(stream, sae):
        pass
    assert hooks_of(stream.model) == before


def test_numbers_of_features_may_be_tensors_and_must_be_whole(stream, ids):
    sae = sae_of(stream)
    with ablate(stream, sae, torch.tensor([3, 5])):
        expected = stream.model(ids).logits
    with ablate(stream, sae, (3, 5)):
        assert torch.equal(stream.model(ids).logits, expected)
    with pytest.raises(TypeError, match="float"), steer(stream, sae, {3.7: 1.0}):
        pass


def test_an_sae_of_another_width(stream):
    sae = ARCHITECTURES["topk"].func(8, 32, 2)
    message = "^d_model=8 of the SAE: the layer is 16 wide$"
    with pytest.raises(ValueError, match=message), steer(stream, sae, {0: 1.0}):
        pass


def test_imported_saes(stream, ids, tmp_path):
    sae = sae_of(stream, "topk")
    interop.export(sae, "saelens", tmp_path / "folder")
    imported = interop.unfold(interop.load_foreign(f"saelens:{tmp_path / 'folder'}"))
    kept = kept_of(ids)
    some = busiest(sae, stream.read(ids)[kept])
    both = [edited_states(stream, ids, ablate(stream, each, some)) for each in (sae, imported)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_patches_of_images_are_edited_and_what_comes_before_them_is_not():
    torch.manual_seed(0)
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=12, patch_size=4)
    model, pixels = ViTForImageClassification(config).eval(), torch.randn(2, 3, 12, 12)
    stream = ResidualStream(model, LAYER)
    x = stream.read(pixels)
    sae = ARCHITECTURES["topk"]()
    sae.loss(x[:, 1:])
    found = edited_states(stream, pixels, splice(stream, sae))
    assert torch.equal(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1:], sae(x[:, 1:]).detach(), rtol=1e-4, atol=1e-5)
