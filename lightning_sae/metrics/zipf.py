"""How well feature densities follow a Zipf-Mandelbrot law, and how many features fall below it."""

import torch
from torch import Tensor

from lightning_sae.metrics.density import FeatureDensity
from lightning_sae.zipf import (
    DYING_BELOW,
    FEWEST_FIRINGS,
    ZipfFitError,
    ZipfMandelbrot,
    fit_zipf,
)


class ZipfStatistics(FeatureDensity):
    """The Zipf-Mandelbrot law that the feature densities follow, and how many fall short of it.

    ``update`` takes codes as `FeatureDensity` does. ``compute`` returns the dictionary of
    `zipf_statistics`, so log it with ``self.log_dict(metric.compute())`` and `reset` by hand, or
    put the metric in a `MetricCollection`. Same arguments, errors and states as `FeatureDensity`,
    with which it shares its counting in a `MetricCollection`.

    Example:
        >>> law = ZipfStatistics(40)
        >>> token, rank = torch.arange(5000).unsqueeze(1), torch.arange(1, 41)
        >>> law.update(token < 5000 / rank)  # the features fire on 5000, 2500, 1667, 1250... tokens
        >>> round(law.compute()["zipf_exponent"].item(), 2), law.compute()["dying_fraction"].item()
        (1.0, 0.0)
    """

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # the base returns densities
        """Return the figures of `zipf_statistics`."""
        return zipf_statistics(super().compute(), int(self.tokens))


def zipf_statistics(density: Tensor, tokens: int) -> dict[str, Tensor]:
    """Return the figures of `lightning_sae.zipf.fit_zipf` that are worth logging.

    Args:
        density: Share of tokens on which each feature fires, `(features,)`, in any order.
        tokens: Tokens over which it was measured.

    Returns:
        0-d float32 tensors, without those that are not finite; none at all if there are no tokens,
        or too few live features for a fit. `zipf_exponent`, `zipf_offset`, `zipf_r2`,
        `zipf_r2_middle` and `zipf_tail_deviation` are attributes of `ZipfMandelbrot`.
        `dying_fraction` is the share of all features, the dead among them, that are dying: alive,
        but below `lightning_sae.zipf.DYING_BELOW` (3/4) of the density that the law gives their
        rank. Ranks where the law expects fewer than 20 firings do not count, as a low count there
        may be chance.

    Raises:
        ValueError: If `density` is no vector of shares, or `tokens` is negative.

    Example:
        >>> density = 0.5 / (torch.arange(1, 1001) + 3.0)
        >>> density[900:950] *= 0.1
        >>> density[950:] = 0
        >>> figures = zipf_statistics(density, tokens=10_000_000)
        >>> for name, value in figures.items():
        ...     print(f"{name} {value:.3f}")
        dying_fraction 0.050
        zipf_exponent 1.000
        zipf_offset 3.004
        zipf_r2 0.797
        zipf_r2_middle 1.000
        zipf_tail_deviation 2.304
    """
    if tokens == 0:
        return {}
    try:
        law = fit_zipf(density, tokens)
    except ZipfFitError:
        return {}
    figures = {
        "dying_fraction": dying_features(density, tokens, law).double().mean().item(),
        "zipf_exponent": law.exponent,
        "zipf_offset": law.offset,
        "zipf_r2": law.r2,
        "zipf_r2_middle": law.r2_middle,
        "zipf_tail_deviation": law.tail_deviation,
    }
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in figures.items()}
    return {name: value.to(density.device) for name, value in tensors.items() if value.isfinite()}


def dying_features(density: Tensor, tokens: int, law: ZipfMandelbrot) -> Tensor:
    """Return which features are dying, as `zipf_statistics` counts them: bool, (features,).

    Args:
        density: Share of tokens on which each feature fires, `(features,)`, in any order.
        tokens: Tokens over which it was measured.
        law: What `lightning_sae.zipf.fit_zipf` returned for them.
    """
    found = density.detach().to("cpu", torch.float64)
    expected = torch.empty_like(found)
    order = found.argsort(descending=True, stable=True)
    expected[order] = law.density(torch.arange(1, len(found) + 1))
    return (found > 0) & (found < DYING_BELOW * expected) & (tokens * expected >= FEWEST_FIRINGS)
