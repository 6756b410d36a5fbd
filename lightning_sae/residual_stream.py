"""Read or replace the residual stream, or another site, of any Hugging Face transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError
from lightning_sae.hooks import hooked
from lightning_sae.layers import a_few_inputs, check_layer, path_of_blocks, starting_after
from lightning_sae.sites import Site, find_site, width_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LayerReached", "ResidualStream"]


class LayerReached(Exception):  # noqa: N818  (a signal that ends a forward pass, not an error)
    """Leaves a forward pass that need not go on."""


class ResidualStream:
    """The residual stream after one block of a language model or a vision transformer.

    The stream is read where it leaves the block, after the block's attention and MLP were added
    and, for the last block too, before the model's final norm. The blocks are found as the only
    outermost `nn.ModuleList` of `num_hidden_layers` modules in what the model calls its decoder: of
    a model that sees images too, the part that reads text. Another `site` of a block is read and
    replaced alike; where it is, a run on eight tokens finds out.

    Args:
        model: Any Hugging Face language model, or a vision transformer. Its weights, dtype and
            device stay as they are.
        layer: Index of the block, from 0, or the path of a module that puts out a stream of the
            same width, as in `model.named_modules()`.
        site: What of the block is meant: `lightning_sae.sites.Site`.

    Attributes:
        path: The path of the module that is read, also of a block.
        before: Whether what goes into that module is read, and not what comes out.

    Raises:
        UsageError: If there is no such layer, or the model's blocks, or the site, cannot be told.
    """

    def __init__(self, model: PreTrainedModel, layer: int | str, site: Site = "resid_post") -> None:
        check_layer(model.config, layer)
        # Private to torch, which has no other name for what a compiled model was before.
        self.model: PreTrainedModel = getattr(model, "_orig_mod", model)
        self.layer = layer
        self.site = site
        block = layer if isinstance(layer, str) else f"{path_of_blocks(self.model)}.{layer}"
        try:
            self.model.get_submodule(block)
        except AttributeError as error:
            raise UsageError(
                f"layer={layer!r}: {type(model).__name__} has no such module"
            ) from error
        run = partial(self.run, a_few_inputs(self.model), None)
        self.path, self.before = find_site(self.model, block, site, run)
        self._module = self.model.get_submodule(self.path)
        self._skips: bool | None = None  # whether blocks may be left out; None: not known yet

    @property
    def d_model(self) -> int:
        """Width of the residual stream, or of what is read in its place."""
        return width_of(self.model.config, self.site)

    @cached_property
    def is_causal_language_model(self) -> bool:
        """Whether the model predicts each token from those before it alone, as its loss needs.

        Found out on eight tokens. It is not one if it gives no logits, or if the last token has a
        say in the logits of those before, as in an encoder such as BERT.
        """
        if not self._reads_text:
            return False
        ids = a_few_inputs(self.model)
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        with torch.no_grad():
            outputs = [self.run(each, None) for each in (ids, other)]
        if any(getattr(output, "logits", None) is None for output in outputs):
            return False
        one, two = (output.logits[:, :-1] for output in outputs)
        # But for rounding: a token may come to another place in a matrix product of experts.
        rounding = 8 * torch.finfo(one.dtype).eps * one.abs().max()
        return bool((one - two).abs().max() <= rounding)

    def __str__(self) -> str:
        site = "" if self.site == "resid_post" else f", site={self.site!r}"
        return f"layer={self.layer!r}{site}"

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model up to the layer and no further.

        Args:
            input_ids: Token ids, (contexts, length), or pixels, (images, 3, height, width).
            attention_mask: 1 for a token, 0 for padding, (contexts, length), before or after the
                tokens; these are read as they are alone. None: no padding. Of no meaning for
                images.

        Returns:
            The residual stream in the model's dtype, (contexts or images, length, d_model).

        Raises:
            UsageError: If the layer puts out anything else for token ids.
        """
        states: list[Tensor] = []

        def stop(x: Tensor) -> Tensor:
            states.append(x)
            raise LayerReached

        with suppress(LayerReached), self.seeing(stop, input_ids):
            self.run(input_ids, attention_mask)
        return states[0]

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
            UsageError: If the model gives no logits, or the layer puts out anything but x.
        """
        model = self.model
        if states is not None and self._may_skip(input_ids, attention_mask):
            model = starting_after(self.model, self.path, states)
        with self.seeing(_edited_by(edit), input_ids):
            output = self.run(input_ids, attention_mask, model)
        if not hasattr(output, "logits"):
            raise UsageError(f"model: {type(self.model).__name__} gives no logits")
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def editing(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Have every run of the model replace the stream x by `edit(x)`, until the block is left.

        `generate` is run so too, where x is that of the newest tokens alone once there is a cache.
        Edits of one layer act in the order in which they were entered. Nothing stays on the model.
        A compiled model runs as if it were not: its code would know nothing of the edit.

        Args:
            edit: As `replace` takes it, x of shape (contexts, new tokens, d_model). Runs in other
                threads are not edited: data modules may read ahead in them.

        Raises:
            UsageError: If the block is left and the model did not run in it, in this thread.
        """
        with torch.compiler.set_stance("force_eager"), self.seeing(_edited_by(edit)):
            yield

    @contextmanager
    def seeing(
        self, see: Callable[[Tensor], Tensor], input_ids: Tensor | None = None
    ) -> Iterator[None]:
        """Have runs of the model give the stream x to `see`, and go on with what that returns.

        Args:
            see: Maps x, in the model's dtype, to what is to be there in its place.
            input_ids: What the runs are given, whose shape that of x must suit. None: anything.

        Raises:
            UsageError: If the block is left and the model did not run in it, in this thread.
        """

        def hook(_module: nn.Module, *seen: Any) -> Any:
            passed = seen[-1]  # the inputs, or else the output
            x = see(self._states_in(passed, input_ids))
            return type(passed)([x, *passed[1:]]) if isinstance(passed, tuple | list) else x

        with hooked(self._module, hook, before=self.before) as calls:
            yield
        if not calls:
            name = type(self.model).__name__
            raise UsageError(f"{self}: {name} did not run it in this thread")

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        model: PreTrainedModel | None = None,
    ) -> Any:
        """Return what the model, or another made of its parts, puts out; as `read` takes them."""
        options: dict[str, Any] = {}
        if self._reads_text:
            options = {"attention_mask": attention_mask, "use_cache": False}
        padded_before = attention_mask is not None and not bool(attention_mask[:, 0].all())
        if padded_before and self._padding_id is not None:
            input_ids = input_ids.where(cast(Tensor, attention_mask) != 0, self._padding_id)
        elif padded_before and "position_ids" in signature(self._inner.forward).parameters:
            # Learned positions are counted from the first column otherwise, padding or not.
            positions = cast(Tensor, attention_mask).long().cumsum(-1) - 1
            options["position_ids"] = positions.clamp(min=0)
        # The model's dtype says how it computes, whatever autocast the caller is in.
        with torch.autocast(self.device.type, enabled=False):
            return (self.model if model is None else model)(input_ids, return_dict=True, **options)

    @property
    def _inner(self) -> nn.Module:
        """The model itself, where PEFT has wrapped it: its wrapper takes any argument."""
        inner: nn.Module = getattr(self.model, "get_base_model", lambda: self.model)()
        return inner

    @property
    def _reads_text(self) -> bool:
        return bool(self.model.main_input_name == "input_ids")

    @cached_property
    def _padding_id(self) -> int | None:
        """The token that the model leaves out where it counts positions, as RoBERTa does."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.padding_idx
        return None

    def _states_in(self, output: Any, input_ids: Tensor | None) -> Tensor:
        """Return the stream in what the module is given or puts out, alone or before others."""
        states = output[0] if isinstance(output, tuple | list) else output
        shape = input_ids.shape if input_ids is not None else getattr(states, "shape", ())[:2]
        expected = (*shape, self.d_model)
        if not isinstance(states, Tensor) or (self._reads_text and states.shape != expected):
            found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise UsageError(
                f"{self} of {type(self.model).__name__} puts out {found} and not "
                f"(contexts, length, d_model), here {expected}"
            )
        return states

    def _may_skip(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Return whether the model's logits follow from what the layer puts out.

        They do not where later blocks read what earlier ones left elsewhere: keys and values, say.
        """
        siblings = self.model.get_submodule(self.path.rpartition(".")[0])
        if not isinstance(siblings, nn.ModuleList) or self.site != "resid_post":
            return False
        if self._skips is None:
            ids, mask = input_ids[:2], None if attention_mask is None else attention_mask[:2]
            with torch.no_grad():
                whole, states = self.run(ids, mask).logits, self.read(ids, mask)
                self.run(torch.zeros_like(ids), mask)  # overwrites what they left
                try:
                    rest = self.run(ids, mask, starting_after(self.model, self.path, states)).logits
                except Exception:  # there is no end to what a model may miss
                    self._skips = False
                else:
                    self._skips = torch.equal(rest, whole)
        return self._skips


def _edited_by(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return an edit that takes and returns the model's dtype."""
    return lambda x: edit(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
