"""State that keeps its 32 bits whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

__all__ = ["ExactBuffers"]


class ExactBuffers(nn.Module):
    """A module whose own float32 buffers stay so when its weights change their type.

    Scales, thresholds and densities are averages over many tokens, which 16 bits cannot hold.

    Attributes:
        exact_parameters: Names of its own parameters that keep 32 bits or more: thresholds that are
            trained, say, whose steps would be lost in rounding.
    """

    exact_parameters: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers between devices, but keep them in float32, and some parameters as wide.

        Overridden as torch's own modules do; `Module.to` and its kin all come here.
        """
        own = dict(self.named_buffers(recurse=False))
        trained = {name: self.get_parameter(name).data for name in self.exact_parameters}
        exact = {name: buffer for name, buffer in own.items() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        for name, values in trained.items():
            parameter = self.get_parameter(name)
            if parameter.dtype.itemsize < 4:
                parameter.data = values.to(parameter.device)
        return self
