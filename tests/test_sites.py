"""Sites of a block, against modules that are named by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, ViTConfig, ViTForImageClassification

from lightning_sae.checks import UsageError
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.sites import hook_name_of, name_of, pairs_of, site_of, width_of
from tests.helpers.language_models import CONFIGS, SIZES, tiny
from tests.test_model_families import tiny_model

GEMMA2 = Gemma2Config(**SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=12)
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
MODULES = {
    "gpt2": ("transformer.h.1", "mlp", "mlp", "attn.c_proj"),
    "llama": ("model.layers.1", "mlp", "mlp", "self_attn.o_proj"),
    "gpt_neox": ("gpt_neox.layers.1", "mlp", "mlp", "attention.dense"),
    # Its norm after the MLP is of what is added, as TransformerLens has it too.
    "gemma2": ("model.layers.1", "mlp", "post_feedforward_layernorm", "self_attn.o_proj"),
}


@pytest.fixture(params=MODULES)
def family(request):
    config = GEMMA2 if request.param == "gemma2" else CONFIGS[request.param]
    return tiny(config), *MODULES[request.param]


def by_hand(model, path, *, before, put=None):
    """What goes into or comes out of a module, and the logits with `put` of it in its place."""
    seen = []

    def hook(_module, *passed):
        x = passed[-1][0] if isinstance(passed[-1], tuple) else passed[-1]
        seen.append(x)
        return None if put is None else ((put(x),) if before else put(x))

    module = model.get_submodule(path)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("site", ["mlp_in", "mlp_out", "z"])
def test_each_site_is_read_and_replaced_where_it_is(family, site):
    model, block, *named = family
    path = f"{block}.{dict(zip(('mlp_in', 'mlp_out', 'z'), named, strict=True))[site]}"
    before = site != "mlp_out"
    stream = ResidualStream(model, 1, site)
    assert (stream.path, stream.before) == (path, before)
    x, clean = by_hand(model, path, before=before)
    assert x.shape == (2, 7, stream.d_model)
    states = stream.read(IDS)
    assert torch.equal(states, x)
    assert torch.equal(stream.replace(IDS, lambda x: x, states=states), clean)
    _, halved = by_hand(model, path, before=before, put=lambda x: x / 2)
    assert torch.equal(stream.replace(IDS, lambda x: x / 2, states=states), halved)
    assert not torch.equal(halved, clean)
    with stream.editing(lambda x: x / 2), torch.no_grad():
        assert torch.equal(model(IDS).logits, halved)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_the_mlp_puts_out_is_what_the_block_adds(family):
    model = family[0]
    whole, added = (ResidualStream(model, 1, site) for site in ("resid_post", "mlp_out"))
    x, y = whole.read(IDS), added.read(IDS)
    with added.editing(torch.zeros_like):
        torch.testing.assert_close(whole.read(IDS) + y, x)


def test_a_block_may_be_named_by_its_path(family):
    model, block, *_ = family
    one, other = (ResidualStream(model, layer, "z") for layer in (1, block))
    assert one.path == other.path


def test_reading_goes_no_further_than_the_site(family):
    model, block, mlp, *_ = family
    ran = []
    handle = model.get_submodule(f"{block}.{mlp}").register_forward_hook(lambda *_: ran.append(1))
    stream = ResidualStream(model, 1, "mlp_in")
    ran.clear()
    stream.read(IDS)
    handle.remove()
    assert not ran


@pytest.mark.parametrize(
    ("model_type", "known"),
    [
        ("mixtral", {"mlp_in", "mlp_out", "z"}),
        ("bloom", {"z"}),  # whose MLP adds the stream itself
        ("bert", {"z"}),  # likewise, and so does its attention, after the projection
        ("opt", set()),  # whose MLP is no module
        ("falcon_mamba", set()),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(model_type, known):
    model = tiny_model(model_type)
    for site in ("mlp_in", "mlp_out", "z"):
        if site in known:
            assert ResidualStream(model, 1, site).read(IDS).shape[:2] == IDS.shape
        else:
            with pytest.raises(UsageError, match=rf"^site='{site}': where it is in \S+1 of \w+ ca"):
                ResidualStream(model, 1, site)


def test_a_vision_transformer():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
    )
    model = ViTForImageClassification(config).eval()
    stream = ResidualStream(model, 1, "z")
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert stream.read(pixels).shape == (2, 10, 16)
    with torch.no_grad():
        assert torch.equal(stream.replace(pixels, lambda x: x), model(pixels).logits)


def test_sites_in_the_models_dtype():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.bfloat16).eval()
    for site in ("mlp_in", "mlp_out", "z"):
        assert ResidualStream(model, 1, site).read(IDS).dtype == torch.bfloat16


def test_names_widths_and_pairs():
    assert width_of(GEMMA2, "mlp_out") == 16
    assert width_of(GEMMA2, "z") == 24
    assert hook_name_of(2, "z") == "blocks.2.attn.hook_z"
    assert hook_name_of("model.layers.2", "z") is None
    assert name_of(2, "resid_post") == "layer_2"
    assert name_of("model.layers.2", "z") == "layer_model_layers_2_z"
    for site in ("resid_post", "mlp_in", "mlp_out", "z"):
        assert site_of(hook_name_of(12, site)) == (12, site)
    assert site_of("blocks.12.hook_resid_pre") is None
    assert pairs_of(2, "z") == [(2, "z")]
    assert pairs_of([1, "h.2"], ["z", "mlp_out"]) == [
        *((1, "z"), (1, "mlp_out")),
        *(("h.2", "z"), ("h.2", "mlp_out")),
    ]


@pytest.mark.parametrize(
    ("layer", "site", "message"),
    [
        (-1, "z", "layer=-1 must be at least 0"),
        ([1, -1], "z", "layer=-1 must be at least 0"),
        ([], "z", r"layer=\[\] must name at least one, and none of them twice"),
        ([1, 1], "z", r"layer=\[1, 1\] must name at least one, and none of them twice"),
        (1, ["z", "z"], r"site=\['z', 'z'\] must name at least one, and none"),
        (1, "q", "site='q' is none of resid_post, mlp_in, mlp_out, z"),
    ],
)
def test_wrong_ones(layer, site, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        pairs_of(layer, site)
