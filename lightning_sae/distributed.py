"""Reductions over all ranks that are also right when there is only one."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Rows(Protocol):
    """A tensor, or something else with a length and a place."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def __len__(self) -> int: ...


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "SUM")


def min_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise minimum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "MIN")


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "MAX")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, without a gradient."""
    return sum_over_ranks(tensor) / world_size()


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
    if world_size() == 1:
        return [rows.detach()]
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    lengths[rank()] = len(rows)
    counts = sum_over_ranks(lengths).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective needs equal shapes
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [each[:count] for each, count in zip(gathered, counts, strict=True)]


def rank() -> int:
    """Return this process's number among those that train together, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reduce(tensor: Tensor, operation: str) -> Tensor:
    result = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result, op=getattr(dist.ReduceOp, operation))
    return result
