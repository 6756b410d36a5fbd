"""What the metrics share: totals that keep their width and that ranks add in an all-reduce."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sae.numerics import widest_float


class TotalsMetric(Metric):
    """A metric whose states are totals over tokens, and whose value depends on nothing else.

    Totals of batches and of ranks simply add up, so the value is the same however the tokens were
    divided, a rank without any included. In two ways this differs from a plain metric:

    * A total keeps its dtype through `.to(dtype)`, `.half()`, `set_dtype` and a Trainer's
      ``precision="bf16-true"``: a count kept in bfloat16 stops at 256, one in float32 at 2^24.
    * Ranks add their totals in an all-reduce. Gathering them instead, as torchmetrics does, holds
      every rank's copy at once: gigabytes for the counts of millions of features.

    For a metric of your own, derive from this class: name its totals with `add_total`, add a batch
    to them in `update`, and make the value of them in `compute`. Of what an SAE measures, `update`
    takes what it names: `codes` (`Matches`), `reconstruction` and `activations` (both (tokens,
    d_model)). What needs more than totals is a plain `torchmetrics.Metric`.

    Args:
        **kwargs: What every `torchmetrics.Metric` takes, such as `process_group` (default: all
            processes), `sync_on_compute`, `dist_sync_on_step` and `compute_on_cpu` (which moves
            states that are lists only, so none of these).

    Example:
        >>> class MeanCode(TotalsMetric):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.add_total("codes", dtype=torch.float64)
        ...         self.add_total("matches")
        ...
        ...     def update(self, codes):
        ...         self.add_to_totals(codes=codes.value.sum(), matches=len(codes))
        ...
        ...     def compute(self):
        ...         return (self.codes / self.matches).float()
        >>> from lightning_sae.matches import Matches
        >>> token, feature, value = (torch.tensor(each) for each in ([0, 1], [2, 0], [1.0, 2]))
        >>> metric = MeanCode()
        >>> metric.update(codes=Matches(token, feature, value, shape=(2, 3)))
        >>> metric.compute()
        tensor(1.5000)
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

    # Private to torch and torchmetrics, which have no public way to exempt a state from casts.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        def move(total: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=torch.uint8, device=total.device)).device
            dtype = widest_float(device) if total.dtype == torch.float64 else total.dtype
            return total.to(device, dtype)

        return super()._apply(move, exclude_state)

    # Private to torchmetrics, whose public `dist_sync_fn` returns what is then stacked and summed:
    # four copies of the totals at a time, where two do.
    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., Any] = gather_all_tensors,
        process_group: Any = None,
    ) -> None:
        totals = all(reduction is dim_zero_sum for reduction in self._reductions.values())
        if dist_sync_fn is not gather_all_tensors or not totals:  # it is the user's own
            super()._sync_dist(dist_sync_fn, process_group)
            return
        kept: Any = self._cache  # copies that sync() has made to restore the states from
        for name in self._reductions:
            # Adding up in the copies takes no third one. A MetricCollection may share originals.
            total, kept[name] = kept[name], getattr(self, name)
            dist.all_reduce(total, group=process_group or self.process_group)
            setattr(self, name, total)
