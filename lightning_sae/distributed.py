"""Sums over all ranks that are also right when there is only one."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "SUM")


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over all ranks, without a gradient."""
    return _reduce(tensor, "MAX")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, without a gradient."""
    return sum_over_ranks(tensor) / world_size()


def world_size() -> int:
    """Return the number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reduce(tensor: Tensor, operation: str) -> Tensor:
    result = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result, op=getattr(dist.ReduceOp, operation))
    return result
