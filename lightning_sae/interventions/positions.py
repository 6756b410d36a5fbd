"""Which tokens of a run are such as the SAE was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from math import prod
from threading import get_ident
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sae.checks import UsageError
from lightning_sae.core import Autoencoder
from lightning_sae.residual_stream import ResidualStream

__all__ = ["Positions", "Run", "special_tokens", "watched"]

_INPUTS: Final = {"input_ids": 2, "pixel_values": 4, "attention_mask": 2, "position_ids": 2}
"""Arguments that say which token is which, and how many dimensions they have."""
_CACHES: Final = ("past_key_values", "cache_params", "state")


@dataclass
class Run:
    """What a model is given in the run that is under way in this thread.

    Attributes:
        inputs: Its arguments by name, of those that say which token is which.
        past: Tokens in the cache that it goes on from; None: some, but the cache does not count.
        depth: How many of the modules that are watched are running, each inside another.
        thread: The thread.
    """

    inputs: dict[str, Tensor]
    past: int | None = 0
    depth: int = 0
    thread: int = field(default_factory=get_ident)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in the arguments of the model, or of a module in it that holds the blocks."""
        if get_ident() != self.thread:
            return
        if self.depth == 0:
            self.inputs, self.past = {}, 0
        self.depth += 1
        given = dict(zip(signature(module.forward).parameters, args, strict=False)) | kwargs
        tensors = {n: given[n] for n in _INPUTS if isinstance(given.get(n), Tensor)}
        # What is made of them further inside, a mask for each pair of tokens say, has more.
        self.inputs |= {n: t for n, t in tensors.items() if t.dim() == _INPUTS[n]}
        for cache in (given[name] for name in _CACHES if given.get(name) is not None):
            self.past = _length(cache)

    def leave(self, *_: Any) -> None:
        """Note that the module has run, or has failed to."""
        if get_ident() == self.thread:
            self.depth -= 1


@dataclass(frozen=True)
class Positions:
    """Which tokens are to be edited: all that are like those in training, or some that are named.

    Attributes:
        special: Ids of tokens that were not trained on.
        where: A bool mask, (contexts or 1, length), of exactly those to be edited. None: padding,
            special tokens and the first token of each context are not.
        patch_size: Of a vision transformer: pixels of a patch, (height, width). Tokens before the
            patches are not edited.
    """

    special: Collection[int] = ()
    where: Tensor | None = None
    patch_size: tuple[int, int] | None = None

    @classmethod
    def of(cls, stream: ResidualStream, sae: Autoencoder, where: Tensor | None) -> Positions:
        """Return those that are to be edited by an SAE.

        Raises:
            UsageError: If `where` is not a bool mask of two dimensions, or there is no SAE but a
                transcoder.
        """
        if hasattr(sae, "d_target"):
            raise UsageError(
                f"{type(sae).__name__} reconstructs something else than it reads: features are "
                "changed, and weighed, of SAEs"
            )
        if where is not None and (where.dim() != 2 or where.dtype != torch.bool):
            raise UsageError(
                f"where of shape {tuple(where.shape)} and {where.dtype}: it must be a bool mask, "
                "(contexts, length)"
            )
        size = getattr(stream.model.config, "patch_size", None)
        both = (size, size) if isinstance(size, int) else size
        return cls(special_tokens(stream, sae), where, None if both is None else tuple(both))

    def among(self, x: Tensor, run: Run) -> Tensor:
        """Return which positions of the stream, (contexts, new tokens, d_model), they are.

        Returns:
            A bool mask, (contexts, new tokens).

        Raises:
            UsageError: If `where` has another number of contexts, or the model does not say which
                of its columns are under way.
        """
        shape = (len(x), x.shape[1])
        if self.where is not None:
            return _named(self.where, shape, run.past).to(x.device)
        return self._like_in_training(shape, run).to(x.device)

    def _like_in_training(self, shape: tuple[int, int], run: Run) -> Tensor:
        length, inputs = shape[1], run.inputs
        if "pixel_values" in inputs and "input_ids" not in inputs and self.patch_size:
            sides = zip(inputs["pixel_values"].shape[-2:], self.patch_size, strict=True)
            patches = prod(side // patch for side, patch in sides)
            return (torch.arange(length) >= length - patches).expand(shape)
        ids, mask, place = (inputs.get(n) for n in ("input_ids", "attention_mask", "position_ids"))
        if mask is not None:
            real = mask != 0
            before = int(run.past != 0 and mask.shape[1] == length)  # it leaves out what is cached
            kept = (real & (real.cumsum(1) + before > 1))[:, -length:]
        elif place is not None:  # 0 for padding too
            kept = place[:, -length:] > 0
        else:
            first = 1 if run.past is None else run.past
            kept = (torch.arange(first, first + length) > 0)[None]
        kept = kept.expand(shape)
        if ids is not None and ids.shape == shape:
            special = torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device)
            kept = kept.to(ids.device) & ~torch.isin(ids, special)
        return kept


@contextmanager
def watched(stream: ResidualStream) -> Iterator[Run]:
    """Keep what the model is given up to date in a `Run`, for runs in this thread."""
    model, names = stream.model, stream.path.split(".")[:-1]
    paths = [".".join(names[:end]) for end in range(len(names) + 1)]
    # Blocks and what is in them are given caches that have the new tokens by then.
    lists = (isinstance(model.get_submodule(path), nn.ModuleList) for path in paths)
    paths = paths[: next((place for place, each in enumerate(lists) if each), len(paths))]
    if getattr(model.config, "is_encoder_decoder", False):
        paths = paths[1:]  # the whole is given what another part of it reads
    run = Run({})
    with ExitStack() as handles:
        for module in map(model.get_submodule, paths):
            enter = module.register_forward_pre_hook(run.enter, with_kwargs=True)
            handles.callback(enter.remove)
            leave = module.register_forward_hook(run.leave, always_call=True)
            handles.callback(leave.remove)
        yield run


def special_tokens(stream: ResidualStream, sae: Autoencoder) -> set[int]:
    """Return the ids of tokens that an SAE was not trained on.

    They are in its record; if not, they are those that the model's configuration names: the first
    of a text, the last, and padding.
    """
    trained_on = getattr(sae, "record", {}).get("trained_on")
    recorded = trained_on.get("special_tokens") if isinstance(trained_on, dict) else None
    if isinstance(recorded, list):
        return {token for token in recorded if isinstance(token, int)}
    config = stream.model.config.get_text_config()
    found: set[int] = set()
    for source in (config, getattr(stream.model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(source, name, None)
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found


def _length(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None: some, but it does not count them."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # of a recurrent model
        begun = getattr(cache, "has_previous_state", lambda: True)()
        return None if begun else 0


def _named(where: Tensor, shape: tuple[int, int], past: int | None) -> Tensor:
    """Return the part of a mask, (contexts, length), that is of new tokens, as this shape."""
    contexts, length = shape
    if past is None:
        raise UsageError(
            "where: the model's cache does not say how many tokens came before; run it with "
            "use_cache=False"
        )
    if contexts % len(where):
        raise UsageError(f"where is of {len(where)} contexts, the run is of {contexts}")
    now = where[:, past : past + length]
    now = functional.pad(now, (0, length - now.shape[1]))
    # `generate` repeats each context for its beams, or for several answers.
    return now.repeat_interleave(contexts // len(where), dim=0)
