"""State that keeps its 32 bits whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["ExactBuffers"]


class ExactBuffers(nn.Module):
    """A module whose own float32 buffers stay so when its weights change their type.

    Scales, thresholds and densities are averages over many tokens, which 16 bits cannot hold.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers between devices, but keep them in float32.

        Overridden as torch's own modules do; `Module.to` and its kin all come here.
        """
        own = dict(self.named_buffers(recurse=False))
        exact = {name: buffer for name, buffer in own.items() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self
