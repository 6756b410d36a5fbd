"""Keep activations on disk, so that a second run need not compute them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.shards import Shards

__all__ = ["ActivationCache"]


@dataclass(frozen=True)
class ActivationCache:
    """A reader of activations that remembers on disk what it has read.

    An input is found again by its content: data, seed and lengths need no further check, and ranks
    need not agree on anything. It is kept once, however often it is read.

    What is returned is what is kept, be it read from the disk or just computed: a run trains the
    same whether its activations were there or not. Kept in the dtype that they are computed in,
    they are those of a run without a cache, as long as no input is read twice. From the second time
    on they are those of the first, where a model that reads it among others would give it others in
    the last bits.

    Args:
        read: Token ids (contexts, length), or images (images, 3, height, width), to activations
            (inputs, length, d_model).
        shards: Where they are kept; whatever else decides the values belongs in its folder's name.
        device: Where to put activations that come from the disk.
        shape: Returns the shape of what is read of inputs.
        dtype: What the model computes in.
        kept_dtype: What activations are rounded to. None: they are kept as they are.
        made_of: Returns what the activations are of, which is written beside them.
    """

    read: Callable[[Tensor], Tensor]
    shards: Shards
    device: torch.device
    shape: Callable[[Tensor], tuple[int, ...]]
    dtype: torch.dtype
    kept_dtype: torch.dtype | None = None
    made_of: Callable[[], Mapping[str, Any]] = dict

    def __call__(
        self, inputs: Tensor, kept: Tensor | None = None, held_out: bool = False
    ) -> Tensor:
        """Return the activations of these inputs, (inputs, length, d_model).

        Args:
            inputs: Tokens or images.
            kept: Which of their positions count, (inputs, length); None: all do.
            held_out: Whether they are never trained on, which is noted of those that are new.

        Raises:
            UsageError: If a file is damaged, holds another shape or type, or cannot be written, or
                activations are too large for the type to keep them in.
        """
        keys = _keys(inputs)
        found = self.shards.find(keys)
        shape = self.shape(inputs)
        self._check(found, shape[1:])
        if all(each is not None for each in found):
            return self._as_computed(torch.stack([each for each in found if each is not None]))
        # All of them, though some were found: what a model gives depends on what it reads with it,
        # in the last bits.
        computed = self._rounded(self.read(inputs)).cpu()
        beside = self._beside(inputs, kept, shape)
        beside["held_out"] = torch.full((len(inputs),), held_out, dtype=torch.uint8)
        self.shards.add(keys, computed, beside, self.made_of())
        rows = [new if old is None else old for new, old in zip(computed, found, strict=True)]
        return self._as_computed(torch.stack(rows))

    def holds(self, inputs: Tensor) -> bool:
        """Whether the activations of all these inputs are there."""
        return self.shards.holds(_keys(inputs))

    def _rounded(self, activations: Tensor) -> Tensor:
        if self.kept_dtype is None:
            return activations
        largest = float(activations.abs().max())
        if torch.finfo(self.kept_dtype).max < largest < float("inf"):
            raise UsageError(
                f"cache_dtype={str(self.kept_dtype).removeprefix('torch.')!r} holds no more than "
                f"{torch.finfo(self.kept_dtype).max:g}, and activations reach {largest:g}: "
                "keep bfloat16 or float32"
            )
        return activations.to(self.kept_dtype)

    def _as_computed(self, activations: Tensor) -> Tensor:
        # Rounded as they may be, the model goes on with them when its loss is measured.
        dtype = activations.dtype if self.kept_dtype is None else self.dtype
        return activations.to(self.device, dtype)

    def _beside(
        self, inputs: Tensor, kept: Tensor | None, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        mask = torch.ones(shape[:2], dtype=torch.uint8) if kept is None else kept.cpu().byte()
        beside = {"kept": mask}
        if inputs.shape == shape[:2] and not inputs.is_floating_point():
            beside["input_ids"] = inputs.cpu().int()
        return beside

    def _check(self, found: list[Tensor | None], shape: tuple[int, ...]) -> None:
        # Some models of sixteen bits keep their residual stream in float32.
        dtypes = {self.dtype, torch.float32} if self.kept_dtype is None else {self.kept_dtype}
        for each in found:
            if each is not None and (each.shape != shape or each.dtype not in dtypes):
                raise UsageError(
                    f"cache_dir: a file in {self.shards.folder} holds {each.dtype} of shape "
                    f"{tuple(each.shape)} instead of {self.kept_dtype or self.dtype} of shape "
                    f"{shape}; delete it, and it is computed again"
                )


def _keys(inputs: Tensor) -> list[int]:
    """Return what tells each of the inputs from all others, as 64 bits."""
    rows = inputs.cpu().contiguous()
    what = f"{rows.dtype} {tuple(rows.shape[1:])}".encode()
    return [
        int.from_bytes(
            hashlib.blake2b(what + row.numpy().tobytes(), digest_size=8).digest(), signed=True
        )
        for row in rows
    ]
