"""What the metrics share: totals that keep their width and that ranks add in an all-reduce."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_sae.numerics import widest_float
from lightning_sae.parallel.legacy import rank_group


class TotalsMetric(Metric):
    """A metric whose states are totals over tokens, and whose value depends on nothing else.

    Totals of batches and of ranks simply add up, so the value is the same however the tokens were
    divided, a rank without any included. In two ways this differs from a plain metric:

    * A total keeps its dtype through `.to(dtype)`, `.half()`, `set_dtype` and a Trainer's
      ``precision="bf16-true"``: a count kept in bfloat16 stops at 256, one in float32 at 2^24.
    * Ranks add their totals in an all-reduce. Gathering them instead, as torchmetrics does, holds
      every rank's copy at once: gigabytes for the counts of millions of features.
    """

    full_state_update = False
    is_differentiable = False

    def add_total(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Add a state that starts at zero.

        Args:
            name: Attribute that holds the total. A `MetricCollection` lets metrics with equal state
                names share one update if their totals agree after the first batch: metrics that
                update differently need different names.
            shape: Shape of the total, none for a scalar.
            dtype: int64 for counts, float64 for sums.
        """
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_to_totals(self, **amounts: Tensor | int) -> None:
        """Add to the totals of these names."""
        for name, amount in amounts.items():
            # Not in place: a total last written in inference mode may not be changed outside of it.
            setattr(self, name, getattr(self, name) + amount)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        def move(total: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=torch.uint8, device=total.device)).device
            dtype = widest_float(device) if total.dtype == torch.float64 else total.dtype
            return total.to(device, dtype)

        return super()._apply(move, exclude_state)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        kept: Any = self._cache  # copies that sync() has made to restore the states from
        for name in self._reductions:
            # Adding up in the copies takes no third one. A MetricCollection may share originals.
            total, kept[name] = kept[name], getattr(self, name)
            dist.all_reduce(total, group=process_group or self.process_group or rank_group())
            setattr(self, name, total)
