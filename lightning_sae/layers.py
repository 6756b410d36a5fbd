"""A transformer's blocks: where they are, what runs through them, and all but the first."""

from __future__ import annotations

from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["a_few_inputs", "check_layer", "path_of_blocks", "starting_after"]


def check_layer(config: PretrainedConfig, layer: int | str) -> None:
    """Raise UsageError if a model of this configuration has no block of index `layer`."""
    if isinstance(layer, str):  # only the model knows its modules
        return
    layers = config.get_text_config().num_hidden_layers
    if not 0 <= layer < layers:
        name = config.name_or_path or config.model_type
        raise UsageError(f"layer={layer} is out of range: {name} has layers 0 to {layers - 1}")


def a_few_inputs(model: PreTrainedModel) -> Tensor:
    """Return eight tokens that a model knows, (1, 8), or an image, (1, channels, height, width)."""
    config: Any = model.config
    if model.main_input_name == "input_ids":
        few: Tensor = torch.arange(16, device=model.device) % config.get_text_config().vocab_size
        return few[None, -8:]
    sides = config.image_size
    sides = (sides, sides) if isinstance(sides, int) else sides
    pixels = torch.linspace(-1, 1, config.num_channels * prod(sides), device=model.device)
    return pixels.view(1, -1, *sides).to(model.dtype)


def path_of_blocks(model: PreTrainedModel) -> str:
    """Return the path of the list of blocks."""
    layers = model.config.get_text_config().num_hidden_layers
    whole: Any = model  # whose `get_decoder` has no types
    both = getattr(model.config, "is_encoder_decoder", False)
    inside = {id(module) for module in (whole if both else whole.get_decoder()).modules()}
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    found = [name for name, module in lists.items() if id(module) in inside] or list(lists)
    # A list inside another belongs to a block (its experts, say).
    outermost = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if len(outermost) != 1:
        raise UsageError(
            f"{type(model).__name__} should have one ModuleList of {layers} blocks, found "
            f"{outermost or 'none'}; layer may be the path of a block"
        )
    (path,) = outermost
    return str(path)


def starting_after(model: PreTrainedModel, path: str, states: Tensor) -> PreTrainedModel:
    """Return the model with blocks up to one that only put out these states.

    Only the modules from the model down to these blocks are others; those share with the model's
    own their hooks, weights and all that is in them.

    Args:
        model: A model.
        path: The last of these blocks, in a list of blocks.
        states: What it is to put out, (contexts, length, d_model).
    """

    def putting_out(block: nn.Module) -> nn.Module:
        idle = copy(block)
        # A copy each time, since models may change what a block puts out in place.
        idle.forward = lambda *_inputs, **_options: states.clone()
        return idle

    path, _, last = path.rpartition(".")
    blocks = dict(model.get_submodule(path).named_children())
    before = list(blocks)[: list(blocks).index(last) + 1]
    others = {name: putting_out(blocks[name]) for name in before}
    while True:
        twin = copy(model.get_submodule(path))
        # Private to torch, where setting a child would set it in the model's own module too.
        twin._modules = {**twin._modules, **others}
        if not path:
            return cast("PreTrainedModel", twin)
        path, _, name = path.rpartition(".")
        others = {name: twin}
