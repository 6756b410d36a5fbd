from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lightning_sae.residual_stream import ResidualStream
from tests.helpers.language_models import CONFIGS, LAYERS, blocks, tiny


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
    stream._module = inner
    assert torch.equal(stream.read(input_ids), expected)
    assert torch.equal(stream.replace(input_ids, lambda x: x), clean)
    assert not torch.equal(stream.replace(input_ids, lambda x: 2 * x), clean)


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
    with pytest.raises(KeyError, match="edit"), stream.editing(fail):
        model(input_ids)
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


def test_editing_lasts_as_long_as_its_block(model, input_ids):
    clean = model(input_ids, output_hidden_states=True).logits  # transformers leaves hooks
    stream = ResidualStream(model, 1)
    with stream.editing(lambda x: 2 * x):
        runs = [model(input_ids), model(input_ids, output_hidden_states=True)]
        with stream.editing(lambda x: x + 1):  # acts after the other
            both = model(input_ids).logits
    for run in runs:
        assert torch.equal(run.logits, stream.replace(input_ids, lambda x: 2 * x))
    assert torch.equal(runs[1].hidden_states[2], 2 * stream.read(input_ids))
    assert torch.equal(both, stream.replace(input_ids, lambda x: 2 * x + 1))
    assert torch.equal(model(input_ids).logits, clean)


def test_an_edit_reaches_what_is_read_and_replaced_in_its_block(model, input_ids):
    stream, later = ResidualStream(model, 1), ResidualStream(model, 2)
    with stream.editing(lambda x: 2 * x):
        read, logits = later.read(input_ids), later.replace(input_ids, lambda x: x)
        assert torch.equal(model(input_ids).logits, logits)
    assert not torch.equal(read, later.read(input_ids))


def test_an_edit_that_met_no_run_is_told(model, input_ids):
    stream = ResidualStream(model, 1)
    message = f"^layer=1: {type(model).__name__} did not run it in this thread$"
    with pytest.raises(ValueError, match=message), stream.editing(lambda x: x):
        pass
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match=message),
        stream.editing(lambda x: 0 * x),
    ):
        elsewhere = pool.submit(lambda: model(input_ids).logits).result()
    assert torch.equal(elsewhere, model(input_ids).logits)
    with pytest.raises(KeyError, match="theirs"), stream.editing(lambda x: x):
        raise KeyError("theirs")


@pytest.mark.parametrize("how", ["wrapped", "in place", "block by block"])
def test_a_compiled_model_is_edited(input_ids, how):
    model = tiny(CONFIGS["llama"])
    clean = model(input_ids).logits
    edited = ResidualStream(model, 1).replace(input_ids, lambda x: 2 * x)
    compiled = torch.compile(model, backend="eager") if how == "wrapped" else model
    for module in {"in place": [model], "block by block": blocks(model)}.get(how, []):
        module.compile(backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids).logits, clean)
        stream = ResidualStream(compiled, 1)
        with stream.editing(lambda x: 2 * x):
            assert torch.equal(compiled(input_ids).logits, edited)
        assert torch.equal(compiled(input_ids).logits, clean)
    torch.compiler.reset()


def test_properties(model):
    stream = ResidualStream(model, 0)
    assert stream.d_model == 16
    assert stream.device == torch.device("cpu")


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
