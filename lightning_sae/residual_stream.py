"""Read or replace one layer's residual stream of any Hugging Face transformer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import copy
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["ResidualStream", "check_layer"]


class _LayerReached(Exception):  # noqa: N818  (a signal that ends a forward pass, not an error)
    """Carries the residual stream out of a forward pass that need not go on."""


class ResidualStream:
    """The residual stream after one block of a causal language model or a vision transformer.

    The stream is read where it leaves the block, after the block's attention and MLP were added
    and, for the last block too, before the model's final norm. The blocks are found as the only
    outermost `nn.ModuleList` of `num_hidden_layers` modules.

    Args:
        model: Any Hugging Face causal language model, or a vision transformer. Its weights, dtype
            and device stay as they are.
        layer: Index of the block, from 0.

    Raises:
        UsageError: If `layer` is out of range, or the model's blocks cannot be told.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        check_layer(model.config, layer)
        self.model = model
        self.layer = layer
        self._path, blocks = _blocks(model)
        self._block = blocks[layer]
        self._skips: bool | None = None  # whether blocks may be left out; None: not known yet

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model up to the layer and no further.

        Args:
            input_ids: Token ids, (contexts, length), or pixels, (images, 3, height, width).
            attention_mask: 1 for a token, 0 for padding, (contexts, length). None: no padding. Of
                no meaning for images.

        Returns:
            The residual stream in the model's dtype, (contexts or images, length, d_model).
        """

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _LayerReached(_hidden_states(output))

        try:
            self._forward(stop, input_ids, attention_mask)
        except _LayerReached as reached:
            states: Tensor = reached.args[0]
            return states
        raise RuntimeError(f"the model's forward pass never ran its block {self.layer}")

    def replace(
        self,
        input_ids: Tensor,
        edit: Callable[[Tensor], Tensor],
        attention_mask: Tensor | None = None,
        *,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run the model with the layer's residual stream x replaced by `edit(x)`.

        Gradients flow through the edit and the later blocks unless the caller disables them.

        Args:
            input_ids: Token ids, (contexts, length), or pixels, (images, 3, height, width).
            edit: Maps x, (contexts or images, length, d_model), to what replaces it, of the same
                shape. It gets float32 (float64 from a float64 model); the result is cast to the
                model's dtype. With `lambda x: x` the model's own logits come out, bit for bit.
            attention_mask: 1 for a token, 0 for padding, (contexts, length). None: no padding. Of
                no meaning for images.
            states: What `read` returned for these inputs. The blocks up to the layer are then not
                run again, unless the model needs more of them than what they put out: the first
                call finds out on two of the inputs. The logits are the same, bit for bit. None: not
                known.

        Returns:
            Logits, (contexts, length, vocabulary), or (images, classes) of a model that classifies.

        Raises:
            UsageError: If the model gives no logits.
        """

        def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            x = _hidden_states(output)
            edited = edit(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        model = self.model
        if states is not None and self._may_skip(input_ids, attention_mask):
            model = self._after(states)
        output = self._forward(splice, input_ids, attention_mask, model)
        if not hasattr(output, "logits"):
            raise UsageError(f"model: {type(self.model).__name__} gives no logits")
        logits: Tensor = output.logits
        return logits

    def _may_skip(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Return whether the model's logits follow from what the layer puts out.

        They do not where later blocks read what earlier ones left elsewhere: keys and values, say.
        """
        if self._skips is None:
            ids, mask = input_ids[:2], None if attention_mask is None else attention_mask[:2]
            with torch.no_grad():
                whole, states = self._forward(None, ids, mask).logits, self.read(ids, mask)
                self._forward(None, torch.zeros_like(ids), mask)  # overwrites what they left
                try:
                    rest = self._forward(None, ids, mask, self._after(states)).logits
                except Exception:  # there is no end to what a model may miss
                    self._skips = False
                else:
                    self._skips = torch.equal(rest, whole)
        return self._skips

    def _after(self, states: Tensor) -> PreTrainedModel:
        """Return the model with blocks up to the layer that only put out these states.

        Only the modules from the model down to these blocks are others; those share with the
        model's own their hooks, weights and all that is in them.
        """

        def putting_out(block: nn.Module) -> nn.Module:
            idle = copy(block)
            # A copy each time, since models may change what a block puts out in place.
            idle.forward = lambda *_inputs, **_options: states.clone()
            return idle

        blocks = self.model.get_submodule(self._path).named_children()
        others = {name: putting_out(b) for name, b in itertools.islice(blocks, self.layer + 1)}
        path = self._path
        while True:
            twin = copy(self.model.get_submodule(path))
            # Private to torch, where setting a child would set it in the model's own module too.
            twin._modules = {**twin._modules, **others}
            if not path:
                return cast("PreTrainedModel", twin)
            path, _, name = path.rpartition(".")
            others = {name: twin}

    def _forward(
        self,
        hook: Callable[..., Any] | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        model: PreTrainedModel | None = None,
    ) -> Any:
        reads_text = self.model.main_input_name == "input_ids"
        options = {"attention_mask": attention_mask, "use_cache": False} if reads_text else {}
        thread = get_ident()

        def in_this_thread(*seen: Any) -> Any:
            # Activations may be read ahead while the same model does something else.
            return hook(*seen) if hook is not None and get_ident() == thread else None

        handle = self._block.register_forward_hook(in_this_thread)
        try:
            # The model's dtype says how it computes, whatever autocast the caller is in.
            with torch.autocast(self.device.type, enabled=False):
                return (model or self.model)(input_ids, return_dict=True, **options)
        finally:
            handle.remove()


def check_layer(config: PretrainedConfig, layer: int) -> None:
    """Raise UsageError unless a model of this configuration has a block of index `layer`."""
    layers = config.get_text_config().num_hidden_layers
    if not 0 <= layer < layers:
        name = config.name_or_path or config.model_type
        raise UsageError(f"layer={layer} is out of range: {name} has layers 0 to {layers - 1}")


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    layers = model.config.get_text_config().num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    # A list inside another belongs to a block (its experts, say).
    outermost = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if len(outermost) != 1:
        raise UsageError(
            f"{type(model).__name__} should have one ModuleList of {layers} blocks, "
            f"found {outermost or 'none'}"
        )
    return outermost[0], found[outermost[0]]


def _hidden_states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
