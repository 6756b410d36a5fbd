"""A model goes on from the states of a layer as if it had run the blocks up to it."""

import pytest
import torch

from lightning_sae.residual_stream import ResidualStream
from tests.helpers.language_models import LAYERS, blocks


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


def test_what_was_read_within_an_edit_is_not_edited_again(model, input_ids):
    stream = ResidualStream(model, 1)
    stream.replace(input_ids, lambda x: x, states=stream.read(input_ids))  # finds out that it may
    with stream.editing(lambda x: x + 1):
        expected = stream.replace(input_ids, lambda x: 2 * x)
        states = stream.read(input_ids)
        assert torch.equal(stream.replace(input_ids, lambda x: 2 * x, states=states), expected)
