"""What tensors of a device say, known on the host: nobody waits for the device to say it.

To read a number from a GPU is to wait until it has done all that it was given before, and meanwhile
nobody gives it anything new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "look", "true_places"]


class HostCopy:
    """A copy, on the host, of what is made of some tensors: made anew only once these change.

    What a step leaves behind is sent at its end, and has long arrived when the next one reads it. A
    change in place counts, as autograd counts it, and so does another tensor in the place of one.
    """

    def __init__(self) -> None:
        self._sources: tuple[Any, ...] = ()
        self._copy: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None

    def send(self, value: Tensor, *sources: Any) -> None:
        """Begin to copy.

        Args:
            value: What is copied, of any shape.
            sources: The tensors, and numbers, that it is made of.
        """
        self._sources = _states(sources)
        # To pinned memory, as torch has it where nobody waits.
        self._copy = value.detach().to("cpu", non_blocking=True, copy=True)
        self._arrival = None
        if value.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(value.device))

    def read(self, make: Callable[[], Tensor], *sources: Any) -> Tensor:
        """Return the copy, which waits only if it is on its way, or sources have changed since.

        Args:
            make: Returns what is to be copied if there is no copy yet of the sources as they are.
            sources: As for `send`.
        """
        if self._copy is None or not _are_same(self._sources, _states(sources)):
            self.send(make(), *sources)
        if self._arrival is not None:
            self._arrival.synchronize()
        assert self._copy is not None  # noqa: S101 - for mypy: `send` made it
        return self._copy

    def of(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor as it is."""
        return self.read(lambda: tensor, tensor)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copy: events cannot be copied or pickled, and it is soon made again."""
        return HostCopy().__dict__


def _states(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        (source, None if source.is_inference() else source._version)
        if isinstance(source, Tensor)
        else (source, source)
        for source in sources
    )


def _are_same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(before) == len(now) and all(
        (one is other if isinstance(other, Tensor) else one == other)
        and state is not None  # tensors of inference mode do not count their changes
        and state == later
        for (one, state), (other, later) in zip(before, now, strict=True)
    )


def look(*numbers: Tensor) -> list[int]:
    """Return numbers, 0-d each, bool or int64, of which the device is asked for all at once."""
    found: list[int] = torch.stack([number.long() for number in numbers]).tolist()
    return found


def true_places(mask: Tensor, count: int) -> Tensor:
    """Return where a mask (n,) is true, ascending, int64, (count,), if it is known how often."""
    if _is_host(mask):
        return mask.nonzero().squeeze(1)
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
