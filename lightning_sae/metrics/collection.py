"""The metrics of one validation: which there are, which share their counts, what they compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_sae.metrics.dead import DeadFeatures
from lightning_sae.metrics.density import FeatureDensity
from lightning_sae.metrics.fraction_of_variance_unexplained import FractionOfVarianceUnexplained
from lightning_sae.metrics.l0 import L0, L0StandardDeviation
from lightning_sae.metrics.prefix_fvu import of_prefixes
from lightning_sae.metrics.tokens import TokenCount
from lightning_sae.metrics.zipf import ZipfStatistics

__all__ = ["collect", "figures", "of_a_dictionary"]

SHARING_COUNTS = ((L0, L0StandardDeviation), (DeadFeatures, FeatureDensity, ZipfStatistics))
"""Metrics that every dictionary has, in groups whose counts are the same."""


def of_a_dictionary(
    d_model: int, n_features: int, prefixes: Sequence[int] | None = None, **options: Any
) -> dict[str, Metric]:
    """Return the metrics that every dictionary has, by name.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        prefixes: Sizes of those within it, `lightning_sae.core.nested`.
        options: What every `torchmetrics.Metric` takes.
    """
    return {
        "fvu": FractionOfVarianceUnexplained(d_model, **options),
        "l0": L0(**options),
        "l0_std": L0StandardDeviation(**options),
        "dead_fraction": DeadFeatures(n_features, **options),
        "feature_density": FeatureDensity(n_features, **options),
        "zipf": ZipfStatistics(n_features, **options),
        "tokens": TokenCount(**options),
        **of_prefixes(d_model, prefixes, **options),
    }


def collect(metrics: Mapping[str, Metric]) -> MetricCollection:
    """Return metrics to be updated together, of which only those of a dictionary share counts.

    Left to itself, torchmetrics has metrics share whose states are equal after the first batch: by
    chance also two that count rare events, neither of which was in that batch.

    Args:
        metrics: By name.
    """
    # By their classes: under the name of one of them a subclass of the SAE may have another metric.
    groups = [[name for name, each in metrics.items() if type(each) in k] for k in SHARING_COUNTS]
    groups += [[name] for name in metrics if not any(name in group for group in groups)]
    return MetricCollection({**metrics}, compute_groups=[group for group in groups if group])


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
