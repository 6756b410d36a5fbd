"""How well feature densities follow a Zipf-Mandelbrot law, and how many features fall below it."""

import torch
from torch import Tensor

from lightning_sae.zipf import FEWEST_FIRINGS, ZipfFitError, fit_zipf


def zipf_statistics(density: Tensor, tokens: int) -> dict[str, Tensor]:
    """Return the figures of `lightning_sae.zipf.fit_zipf` that are worth logging.

    Args:
        density: Share of tokens on which each feature fires, `(features,)`, in any order.
        tokens: Tokens over which it was measured.

    Returns:
        0-d float32 tensors, without those that are not finite; none at all if there are no tokens,
        or too few live features for a fit. `zipf_exponent`, `zipf_offset`, `zipf_r2`,
        `zipf_r2_middle` and `zipf_tail_deviation` are attributes of `ZipfMandelbrot`.
        `dying_fraction` is the share of all features that are alive but fire at less than half the
        density that the law gives their rank: a reconstruction, since the paper's definition was
        not available. Ranks where the law expects fewer than 20 firings do not count, as a low
        count there may be chance.

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
    found = density.detach().to("cpu", torch.float64).sort(descending=True).values
    expected = law.density(torch.arange(1, len(found) + 1))
    dying = (found > 0) & (found < expected / 2) & (tokens * expected >= FEWEST_FIRINGS)
    figures = {
        "dying_fraction": dying.double().mean().item(),
        "zipf_exponent": law.exponent,
        "zipf_offset": law.offset,
        "zipf_r2": law.r2,
        "zipf_r2_middle": law.r2_middle,
        "zipf_tail_deviation": law.tail_deviation,
    }
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in figures.items()}
    return {name: value.to(density.device) for name, value in tensors.items() if value.isfinite()}
