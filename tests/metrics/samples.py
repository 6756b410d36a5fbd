"""Random activations, codes and reconstructions for the metrics of dictionaries."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sae.metrics import (
    L0,
    Correlation,
    DeadFeatures,
    FeatureDensity,
    FractionOfVarianceUnexplained,
    L0StandardDeviation,
)

D_MODEL = 3
N_FEATURES = 7


def all_metrics() -> dict[str, Metric]:
    return {
        "l0": L0(),
        "l0_std": L0StandardDeviation(),
        "density": FeatureDensity(N_FEATURES),
        "dead": DeadFeatures(N_FEATURES),
        "fvu": FractionOfVarianceUnexplained(D_MODEL),
        "correlation": Correlation(),
    }


def sample(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Return `codes`, `activations`, `reconstruction` and numbers `x` and `y` of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(tokens, N_FEATURES, generator=generator) - torch.linspace(0, 3, N_FEATURES)
    x = 5 + torch.randn(tokens, D_MODEL, generator=generator)
    noise = torch.randn(tokens, D_MODEL, generator=generator)
    sae = {"codes": codes.relu(), "activations": x, "reconstruction": x + 0.3 * noise}
    return sae | {"x": x, "y": x - noise}


def split(data: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    """Cut the tokens into batches of these sizes."""
    parts = {name: tensor.split(sizes) for name, tensor in data.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(sizes))]


def update(metric: Metric, batch: dict[str, Tensor]) -> None:
    """Update any of the metrics with the part of the batch that it takes."""
    takes = {
        FractionOfVarianceUnexplained: ("reconstruction", "activations"),
        Correlation: ("x", "y"),
    }
    metric.update(*[batch[name] for name in takes.get(type(metric), ("codes",))])


def values(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the value of every metric after these batches."""
    metrics = all_metrics()
    for metric in metrics.values():
        for batch in batches:
            update(metric, batch)
    return {name: metric.compute() for name, metric in metrics.items()}
