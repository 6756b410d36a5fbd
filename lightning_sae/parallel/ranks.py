"""Reductions over the processes that train together, right when there is only one too.

Ranks are the processes that have different tokens: all there are, unless features are shared out
over some of them, which then read the same tokens.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "all_gather", "all_reduce", "processes", "ranks_of"]

Reduction = Literal["sum", "min", "max"]


@dataclass(frozen=True)
class Ranks:
    """The processes that train together on different tokens.

    No method passes on a gradient. All ranks must call the same methods in the same order. Where
    torch.distributed is not initialised there is one rank, and nothing is sent.

    Args:
        mesh: Those of them, one-dimensional. None: all processes there are, at the time of a call.
    """

    mesh: DeviceMesh | None = None  # not its group, which cannot be copied or pickled

    @property
    def group(self) -> Any:
        """Their process group; None for all processes."""
        return None if self.mesh is None else self.mesh.get_group()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group) if _initialized() else 1

    @property
    def index(self) -> int:
        """This process's number among them, from 0."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    @property
    def is_first_with_its_tokens(self) -> bool:
        """Whether no process before this one has the same tokens."""
        number, count = processes()
        return number % (count // self.size) == 0

    def all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Return the elementwise sum, minimum or maximum of a tensor over all ranks."""
        return all_reduce(tensor, reduction, self.group)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks."""
        return self.all_reduce(tensor) / self.size

    def average(self, means: Tensor, weight: int) -> Tensor:
        """Return the average over all ranks of means, each of which counts by its weight.

        Args:
            means: Of this rank's tokens, say; whatever they are if it has none. Shape (n,).
            weight: How many those are.

        Returns:
            Shape (n,); NaN if all weights are 0.
        """
        if self.size == 1:
            return means.detach()
        own = means.detach() * weight if weight else torch.zeros_like(means)
        total = self.all_reduce(torch.cat([own, own.new_tensor([weight])]))
        return total[:-1] / total[-1]

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """Return every rank's rows.

        Args:
            rows: Shape (n, ...); n may differ between ranks.

        Returns:
            One tensor a rank, in the order of ranks.
        """
        return [rows.detach()] if self.size == 1 else all_gather(rows, self.group)

    def broadcast(self, tensor: Tensor) -> None:
        """Make a tensor on all ranks, in place, what it is on the first."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
            torch.autograd.graph.increment_version(tensor)  # which torch leaves out

    def count(self, rows: Sized, device: torch.device) -> int:
        """Return how many rows there are on all ranks together.

        Args:
            rows: Those of this rank: anything that has a length.
            device: Where the process group can send from.
        """
        if self.size == 1:
            return len(rows)
        return int(self.all_reduce(torch.tensor(len(rows), device=device)))


def ranks_of(trainer: Any) -> Ranks:
    """Return the ranks among the processes of a Lightning Trainer; all there are without one.

    A `ModelParallelStrategy` has a mesh of devices, along one side of which tokens differ.
    """
    mesh = getattr(getattr(trainer, "strategy", None), "device_mesh", None)
    return Ranks() if mesh is None else Ranks(mesh["data_parallel"])


def processes() -> tuple[int, int]:
    """Return this process's number among all, those with the same tokens too, and how many."""
    return (dist.get_rank(), dist.get_world_size()) if _initialized() else (0, 1)


def all_reduce(tensor: Tensor, reduction: Reduction = "sum", group: Any = None) -> Tensor:
    """Return the elementwise sum, minimum or maximum over a group's processes, without a gradient.

    Args:
        tensor: Of the same shape on all of them.
        reduction: Which.
        group: Process group. None: all processes there are.
    """
    result = tensor.detach().clone()
    if _initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(result, op=getattr(dist.ReduceOp, reduction.upper()), group=group)
    return result


def all_gather(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Return the rows of every process of a group, without a gradient.

    Args:
        rows: Shape (n, ...); n may differ between processes.
        group: Process group. None: all processes there are.

    Returns:
        One tensor a process, in their order.
    """
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=rows.device)
    lengths[dist.get_rank(group)] = len(rows)
    dist.all_reduce(lengths, group=group)
    counts = lengths.tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective needs equal shapes
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [each[:count] for each, count in zip(gathered, counts, strict=True)]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
