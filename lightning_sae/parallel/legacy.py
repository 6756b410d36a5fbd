"""Reductions over all ranks that are also right when there is only one.

Ranks are the processes that train together on different tokens: all there are, unless
`different_tokens_in` says otherwise, because features are shared out too.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_group: Any = None  # of the processes with different tokens; None: all


class Rows(Protocol):
    """A tensor, or something else with a length and a place."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def __len__(self) -> int: ...


def different_tokens_in(group: Any) -> None:
    """Say which processes train together on different tokens.

    Args:
        group: Their process group. None: all there are.
    """
    global _group
    _group = group


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "SUM")


def min_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise minimum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "MIN")


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "MAX")


def max_over_processes(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum over all processes, those with the same tokens too."""
    return _reduce(tensor, "MAX", everyone=True)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, without a gradient."""
    return sum_over_ranks(tensor) / world_size()


def from_first_rank(tensor: Tensor) -> None:
    """Make a tensor on all ranks, in place, what it is on the first."""
    if world_size() > 1:
        dist.broadcast(tensor, group=_group, group_src=0)


def length_over_ranks(rows: Rows) -> int:
    """Return how many rows there are on all ranks together."""
    if world_size() == 1:
        return len(rows)
    return int(sum_over_ranks(torch.tensor(len(rows), device=rows.device)))


def gather_over_ranks(rows: Tensor) -> list[Tensor]:
    """Return every rank's rows, without a gradient.

    Args:
        rows: Shape (n, ...); n may differ between ranks.

    Returns:
        One tensor a rank, in the order of ranks.
    """
    return [rows.detach()] if world_size() == 1 else gather(rows, _group)


def gather(rows: Tensor, group: Any) -> list[Tensor]:
    """Return the rows of every process of a group (None: of all), as `gather_over_ranks` does."""
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=rows.device)
    lengths[dist.get_rank(group)] = len(rows)
    dist.all_reduce(lengths, group=group)
    counts = lengths.tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective needs equal shapes
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [each[:count] for each, count in zip(gathered, counts, strict=True)]


def rank_group() -> Any:
    """Return the process group of the ranks; None where it is that of all processes."""
    return _group


def rank() -> int:
    """Return this process's number among those that train together, from 0."""
    return dist.get_rank(_group) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of ranks that train together."""
    return dist.get_world_size(_group) if _initialized() else 1


def processes() -> tuple[int, int]:
    """Return this process's number among all, those with the same tokens too, and how many."""
    return (dist.get_rank(), dist.get_world_size()) if _initialized() else (0, 1)


def is_first_with_these_tokens() -> bool:
    """Return whether no process before this one has the same tokens."""
    number, count = processes()
    return number % (count // world_size()) == 0


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduce(tensor: Tensor, operation: str, *, everyone: bool = False) -> Tensor:
    result = tensor.detach().clone()
    group = None if everyone else _group
    if _initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(result, op=getattr(dist.ReduceOp, operation), group=group)
    return result
