"""The metrics of one validation: which of them share their counts, and what all of them compute."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["collect", "figures"]

SHARING_COUNTS = (("l0", "l0_std"), ("dead_fraction", "feature_density", "zipf"))
"""Names of metrics that `SparseAutoencoder` has, in groups whose states are the same."""


def collect(metrics: Mapping[str, Metric]) -> MetricCollection:
    """Return metrics to be updated together, of which only those named above share counts.

    Left to itself, torchmetrics has metrics share whose states are equal after the first batch: by
    chance also two that count rare events, neither of which was in that batch.

    Args:
        metrics: By name.
    """
    sharing = [[name for name in group if name in metrics] for group in SHARING_COUNTS]
    alone = [[name] for name in metrics if name not in itertools.chain(*sharing)]
    groups = [group for group in (*sharing, *alone) if group]
    return MetricCollection({**metrics}, compute_groups=groups)


def figures(collection: MetricCollection) -> dict[str, Tensor]:
    """Return the numbers that metrics compute: by their names, those of dictionaries by their keys.

    What is no single number, such as densities, is left out.
    """
    found: dict[str, Tensor] = {}
    for name, metric in collection.items(keep_base=True, copy_state=False):
        value = metric.compute()
        found |= value if isinstance(value, dict) else {str(name): value}
    tensors = {name: torch.as_tensor(value) for name, value in found.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.dim() == 0}
