from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lightning_sae.residual_stream import ResidualStream

LAYERS = 3
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=24),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for parameter in model.parameters():  # or small weights would hide what a block adds
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def input_ids():
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def blocks(model):
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def hidden_states(model, input_ids):
    """Every block's output, by hooks that change nothing."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for block in blocks(model)
    ]
    with torch.no_grad():
        logits = model(input_ids).logits
    for handle in handles:
        handle.remove()
    return [o[0] if isinstance(o, tuple) else o for o in outputs], logits


@pytest.mark.parametrize("layer", range(LAYERS))
def test_read_is_the_blocks_output(model, input_ids, layer):
    with torch.no_grad():
        transformers_own = model(input_ids, output_hidden_states=True).hidden_states
    ours = ResidualStream(model, layer).read(input_ids)
    assert ours.shape == (2, 7, 16)
    assert torch.equal(ours, hidden_states(model, input_ids)[0][layer])
    # Transformers gives the last layer after the final norm.
    assert torch.equal(ours, transformers_own[layer + 1]) == (layer < LAYERS - 1)


def test_read_runs_nothing_after_the_layer(model, input_ids):
    ran = []
    later = [*blocks(model)[1:], model.get_output_embeddings()]
    later += [m for n, m in model.base_model.named_children() if "norm" in n or n == "ln_f"]
    assert len(later) == LAYERS + 1
    handles = [m.register_forward_hook(lambda *_: ran.append(1)) for m in later]
    ResidualStream(model, 0).read(input_ids)
    assert not ran
    model(input_ids)
    assert len(ran) == LAYERS + 1
    for handle in handles:
        handle.remove()


def test_read_can_be_trained_on(model, input_ids):
    states = ResidualStream(model, 1).read(input_ids)
    assert not states.requires_grad
    assert not states.is_inference()
    weight = torch.ones(16, requires_grad=True)
    (states * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_replace_with_itself_is_the_clean_model(model, input_ids, layer, dtype):
    model.to(dtype)
    clean = hidden_states(model, input_ids)[1]
    with torch.no_grad():
        assert torch.equal(ResidualStream(model, layer).replace(input_ids, lambda x: x), clean)


def test_replace_edits_what_later_blocks_see(model, input_ids):
    seen = []

    def edit(x):
        seen.append(x)
        return torch.zeros_like(x)

    stream = ResidualStream(model, LAYERS - 1)
    logits = stream.replace(input_ids, edit)
    assert torch.equal(seen[0], stream.read(input_ids))
    # Nothing but the final norm and the head follow, so all positions are alike.
    assert torch.allclose(logits, logits[:1, :1].expand_as(logits), atol=1e-6)
    assert not torch.equal(logits, model(input_ids).logits)


def test_replace_gives_float32_to_the_edit_and_gradients_to_its_weights(input_ids):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.bfloat16)
    weight = torch.ones(16, requires_grad=True)

    def edit(x):
        assert x.dtype == torch.float32
        return x * weight

    logits = ResidualStream(model.requires_grad_(requires_grad=False), 1).replace(input_ids, edit)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_blocks_that_return_tuples(model, input_ids):
    class InTuple(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs), "cache"

    class OutOfTuple(InTuple):
        def forward(self, *args, **kwargs):
            output = self.block(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

    expected, clean = ResidualStream(model, 1).read(input_ids), model(input_ids).logits
    stream = ResidualStream(model, 1)
    inner = InTuple(blocks(model)[1])
    blocks(model)[1] = OutOfTuple(inner)
    stream._block = inner
    assert torch.equal(stream.read(input_ids), expected)
    assert torch.equal(stream.replace(input_ids, lambda x: x), clean)
    assert not torch.equal(stream.replace(input_ids, lambda x: 2 * x), clean)


def test_padding_does_not_change_the_tokens_before_it(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[:, 5:] = 0
    stream = ResidualStream(model, 1)
    padded = stream.read(input_ids, attention_mask=mask)
    torch.testing.assert_close(padded[:, :5], stream.read(input_ids[:, :5]))


def test_padding_before_the_tokens_is_not_read(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[:, :2] = 0
    stream = ResidualStream(model, 1)
    other = input_ids.clone()
    other[:, :2] = (other[:, :2] + 1) % 50
    masked = [stream.read(ids, attention_mask=mask)[:, 2:] for ids in (input_ids, other)]
    torch.testing.assert_close(masked[0], masked[1])
    logits = [stream.replace(ids, lambda x: x, mask)[:, 2:] for ids in (input_ids, other)]
    torch.testing.assert_close(logits[0], logits[1])


def test_autocast_around_it_changes_nothing(model, input_ids):
    stream = ResidualStream(model, 1)
    expected, clean = stream.read(input_ids), stream.replace(input_ids, lambda x: x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stream.read(input_ids), expected)
        assert torch.equal(stream.replace(input_ids, lambda x: x), clean)


def test_hooks_never_stay(model, input_ids):
    def fail(_x):
        raise KeyError("edit")

    stream = ResidualStream(model, 1)
    stream.read(input_ids)
    with pytest.raises(KeyError, match="edit"):
        stream.replace(input_ids, fail)
    with pytest.raises((IndexError, RuntimeError)):
        stream.read(input_ids + 50)
    assert all(not module._forward_hooks for module in blocks(model))
    assert model(input_ids).logits.shape == (2, 7, 50)


def test_threads_do_not_meet_each_others_hooks(model, input_ids):
    stream = ResidualStream(model, 1)
    states, logits = stream.read(input_ids), stream.replace(input_ids, lambda x: 0 * x)
    clean = model(input_ids).logits
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [stream.read(input_ids) for _ in range(200)])
        replaced, run = [], []
        while not reading.done():
            replaced.append(stream.replace(input_ids, lambda x: 0 * x))
            run.append(model(input_ids).logits)
    for found, expected in ((reading.result(), states), (replaced, logits), (run, clean)):
        assert found
        assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("masked", [False, True])
def test_states_at_hand_spare_the_blocks_up_to_the_layer(model, input_ids, layer, masked):
    mask = torch.ones_like(input_ids) if masked else None
    if masked:
        mask[0, :3] = 0
    stream = ResidualStream(model, layer)
    states = stream.read(input_ids, mask)
    edits = (lambda x: x, lambda x: 0.5 * x + 1, torch.zeros_like)
    expected = [stream.replace(input_ids, edit, mask) for edit in edits]
    modules = {name: dict(module._modules) for name, module in model.named_modules()}
    stream.replace(input_ids, edits[0], mask, states=states)  # finds out whether it may
    ran = []
    handles = [
        next(block.children()).register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(blocks(model))
    ]
    found = [stream.replace(input_ids, edit, mask, states=states) for edit in edits]
    assert ran == [n for _ in edits for n in range(layer + 1, LAYERS)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    for handle in handles:
        handle.remove()
    # The model itself is as it was.
    assert {name: dict(module._modules) for name, module in model.named_modules()} == modules
    assert torch.equal(stream.replace(input_ids, edits[1], mask), expected[1])


def test_states_at_hand_pass_on_gradients_and_stay_as_they_are(model, input_ids):
    stream = ResidualStream(model.requires_grad_(requires_grad=False), 1)
    states = stream.read(input_ids)
    before = states.clone()

    def in_place(_module, inputs):
        inputs[0].mul_(2)  # as a model may do

    handle = blocks(model)[2].register_forward_pre_hook(in_place)
    with torch.no_grad():
        expected = stream.replace(input_ids, lambda x: x)
        for _ in range(2):
            assert torch.equal(stream.replace(input_ids, lambda x: x, states=states), expected)
    handle.remove()
    assert torch.equal(states, before)
    weights = [torch.ones(16, requires_grad=True) for _ in range(2)]
    stream.replace(input_ids, lambda x: x * weights[0]).square().sum().backward()
    stream.replace(input_ids, lambda x: x * weights[1], states=states).square().sum().backward()
    assert weights[0].grad.abs().sum() > 0
    assert torch.equal(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("way", ["left behind", "in a tuple"])
def test_a_model_that_needs_more_than_the_states_is_run_as_a_whole(model, input_ids, way):
    """As one whose later blocks use the keys and values of earlier ones does."""
    left = {}

    def leave(_module, _inputs, output):
        left["there"] = output[0] if isinstance(output, tuple) else output

    def take_up(_module, _inputs, output):
        return output + left["there"]

    first, last = blocks(model)[0], blocks(model)[-1]
    if way == "left behind":
        next(first.children()).register_forward_hook(leave)
        last.register_forward_hook(take_up)
    else:
        forward = first.forward
        first.forward = lambda *args, **kwargs: (forward(*args, **kwargs), 2)
        second = blocks(model)[1]
        second.register_forward_pre_hook(lambda _m, args: (args[0][0] * args[0][1], *args[1:]))
    stream = ResidualStream(model, 0)
    other = (input_ids + 1) % 50
    states = [stream.read(ids) for ids in (input_ids, other)]
    for ids, known in zip((input_ids, other), states, strict=True):
        expected = stream.replace(ids, lambda x: 0.5 * x)
        assert torch.equal(stream.replace(ids, lambda x: 0.5 * x, states=known), expected)


def test_properties(model):
    stream = ResidualStream(model, 0)
    assert stream.d_model == 16
    assert stream.device == torch.device("cpu")


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layer_out_of_range(model, layer):
    name = model.config.model_type
    message = f"^layer={layer} is out of range: {name} has layers 0 to 2$"
    with pytest.raises(ValueError, match=message):
        ResidualStream(model, layer)


def test_lists_inside_blocks_are_not_the_blocks(model, input_ids):
    expected = ResidualStream(model, 1).read(input_ids)
    for block in blocks(model):
        block.experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert torch.equal(ResidualStream(model, 1).read(input_ids), expected)


def test_no_blocks_and_ambiguous_blocks():
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    model.transformer.h.append(nn.Identity())
    with pytest.raises(ValueError, match=r"one ModuleList of 3 blocks, found none; layer may be"):
        ResidualStream(model, 0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(
        ValueError, match=r"found \['encoder.block', 'decoder.block'\]; layer may be"
    ):
        ResidualStream(T5ForConditionalGeneration(config), 0)


VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=12,
    patch_size=4,
)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_vision_transformer(layer):
    torch.manual_seed(0)
    model = ViTForImageClassification(VIT).eval()
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        clean = model(pixels, output_hidden_states=True)
    stream = ResidualStream(model, layer)
    assert stream.d_model == 16
    assert torch.equal(stream.read(pixels), clean.hidden_states[layer + 1])
    assert torch.equal(stream.replace(pixels, lambda x: x), clean.logits)
    assert not torch.allclose(stream.replace(pixels, torch.zeros_like), clean.logits)


def test_a_model_without_logits():
    stream = ResidualStream(ViTModel(VIT).eval(), 1)
    with pytest.raises(ValueError, match=r"^model: ViTModel gives no logits$"):
        stream.replace(torch.zeros(1, 3, 12, 12), lambda x: x)
