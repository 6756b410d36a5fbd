"""The Zipf-Mandelbrot law of feature densities: fit it, and find the dying.

Sorted by density, the share of tokens on which a feature fires, all but the rarest features follow
`scale / (rank + offset) ** exponent` (Ayonrinde 2024, arXiv 2411.02124). The paper fits a Zipf law;
the estimator, the offset and the definition of dying features are this library's reconstruction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.numerics import widest_float

__all__ = [
    "DYING_BELOW",
    "ZipfFitError",
    "ZipfMandelbrot",
    "fit_zipf",
    "zipf_deficit",
]

FEWEST_FIRINGS = 20
"""Fewer are not judged by: the noise of a smaller count exceeds 22 %."""

DYING_BELOW = 0.75
"""A feature is dying if it is alive and below this share of the density the law gives its rank.

A reconstruction: the paper's definition was not available. In short runs `aux_zipf_loss` left fewer
of them with this as its `dying_below` than with 1/2. `dying_fraction` counts by it, at ranks where
the law expects `FEWEST_FIRINGS` at least.
"""

_FLATTEST, _STEEPEST = 0.1, 3.0  # exponents
_CLIFF = 8.0  # slope: nearly dead features lie below one; a roll-off is less steep
_HEAD, _TAIL = 0.004, 0.81  # shares of the live ranks: the paper's ranks 100 and 20,000 of 24,576


class ZipfFitError(ValueError):
    """Too few features fire often enough for a Zipf-Mandelbrot law to be fitted."""


@dataclass(frozen=True)
class ZipfMandelbrot:
    """A law `density(rank) = scale / (rank + offset) ** exponent`, and how well it fits.

    Attributes:
        scale: Density at `rank + offset == 1`, in shares of tokens; may exceed 1.
        exponent: Slope s of the straight part, within 0.1 .. 3.
        offset: Rank q below which the curve flattens, within 0 .. live features / 10.
        r2: R^2 of log density over all live ranks; high for any falling curve.
        r2_middle: R^2 from 0.4 % to 81 % of the live ranks, the paper's 100 .. 20,000 of 24,576.
        tail_deviation: Largest `|log(density / fitted density)|` over the live ranks beyond 81 %.
    """

    scale: float
    exponent: float
    offset: float
    r2: float
    r2_middle: float
    tail_deviation: float

    def density(self, ranks: Tensor) -> Tensor:
        """Return the densities at `ranks`, of any shape, in float64; rank 1 is the densest."""
        return self.scale / (ranks.to(torch.float64) + self.offset) ** self.exponent


def fit_zipf(density: Tensor, tokens: int) -> ZipfMandelbrot:
    """Fit a Zipf-Mandelbrot law to measured feature densities.

    Least squares of log counts over 60 log-spaced bins of ranks; over single ranks the rarest would
    decide. Sorting noisy counts raises them by 1 / (2s), which is taken off. Left out are the
    rarest 19 % of the live features, where the law breaks down, what fired fewer than 20 times, and
    what lies beyond a cliff, where density falls faster than rank^-8: if most features are nearly
    dead, the fit is of the others.

    On counts drawn from a law, the exponent is recovered to 1 % from 100,000 tokens on; the offset
    to 5 % from 100,000, to 2 % from a million and to 1 % from 10 million tokens on (512 to 24,576
    features, s from 0.6 to 1.5, q from 1 to 50).

    Args:
        density: Share of tokens on which each feature fires, `(features,)`, in any order. Those of
            any SAE will do, and so will running averages over about as many tokens.
        tokens: Tokens over which it was measured.

    Raises:
        ZipfFitError: If fewer than ten features are left to fit.
        ValueError: If `density` is no vector of shares or `tokens` is not positive.

    Example:
        >>> density = 0.5 / (torch.arange(1, 1001) + 3.0) ** 1.2
        >>> law = fit_zipf(density, tokens=10_000_000)
        >>> f"s={law.exponent:.2f} q={law.offset:.1f} R2={law.r2:.3f}"
        's=1.20 q=3.0 R2=1.000'
        >>> law.density(torch.tensor([7, 97]))
        tensor([0.0316, 0.0020], dtype=torch.float64)
    """
    counts = _sorted_counts(density, tokens)
    live = int((counts > 0).sum())
    middle = slice(math.ceil(_HEAD * live) - 1, int(_TAIL * live))
    fitted = min(middle.stop, int((counts >= FEWEST_FIRINGS).sum()))
    if fitted < 10:
        raise ZipfFitError(
            f"a Zipf fit needs 10 features outside the tail that fired {FEWEST_FIRINGS} times, but "
            f"{fitted} of {counts.numel()} features ({live} live) did in {tokens} tokens: measure "
            "on more tokens, or train until more features fire"
        )
    ranks = torch.arange(1, live + 1, dtype=torch.float64)
    x, y = _bin_means(ranks[:fitted]), _bin_means(counts[:fitted])
    end = _bins_before_cliff(x, y)
    x, y = x[:end], y[:end]
    exponent = 1.0
    for _ in range(3):  # what sorting adds depends on the exponent, but weakly
        log_y = (y - 0.5 / exponent).log()
        exponent, offset = _least_squares(x, log_y, largest_offset=live / 10)
    intercept = (log_y + exponent * (x + offset).log()).mean().item()
    observed = counts[:live].log()
    residual = observed - intercept + exponent * (ranks + offset).log()
    return ZipfMandelbrot(
        scale=math.exp(intercept) / tokens,
        exponent=exponent,
        offset=offset,
        r2=_r2(observed, residual),
        r2_middle=_r2(observed[middle], residual[middle]),
        tail_deviation=residual[middle.stop :].abs().max().item(),
    )


def zipf_deficit(density: Tensor, tokens: int) -> Tensor:
    """Return by which share each feature falls short of the density that its rank should have.

    That is `1 - density / law(rank)` within 0 .. 1 for the law that `fit_zipf` finds: 0 on the law
    or above it, 1 for a feature that never fires. A reconstruction: how the paper measures
    underuse was not available.

    Args:
        density: Share of tokens on which each feature fires, `(features,)`, in any order.
        tokens: Tokens over which it was measured.

    Returns:
        float32, `(features,)`, on the device of `density`.

    Raises:
        ZipfFitError: If too few features are live for a fit.
        ValueError: If `density` is no vector of shares or `tokens` is not positive.

    Example:
        >>> density = 0.5 / (torch.arange(1, 1001) + 3.0)
        >>> density[900] *= 0.4
        >>> zipf_deficit(density, tokens=10_000_000)[[10, 900]].round(decimals=1)
        tensor([0.0000, 0.6000])
    """
    law = fit_zipf(density, tokens)
    return deficit_by(density, law.scale, law.exponent, law.offset)


def deficit_by(
    density: Tensor, scale: Tensor | float, exponent: Tensor | float, offset: Tensor | float
) -> Tensor:
    """Return what `zipf_deficit` does, for a law that is known, on the device of the densities.

    Args:
        density: As for `zipf_deficit`.
        scale: As in `ZipfMandelbrot`, a number or 0-d.
        exponent: See there.
        offset: See there.
    """
    order = density.argsort(descending=True, stable=True)
    ranks = torch.arange(1, density.numel() + 1, device=density.device)
    law = scale / (ranks.to(widest_float(density.device)) + offset) ** exponent
    expected = torch.empty_like(law).index_copy_(0, order, law)
    return (1 - density / expected).clamp(0, 1).float()


def _sorted_counts(density: Tensor, tokens: int) -> Tensor:
    """Return how often each feature fired, most first, (features,), float64 on the CPU."""
    if tokens < 1 or density.ndim != 1 or not ((density >= 0) & (density <= 1)).all():
        found = f"{density.min():.3g} .. {density.max():.3g} of shape {tuple(density.shape)}"
        raise UsageError(f"{tokens=} must be > 0 and densities a vector within 0 .. 1, not {found}")
    return density.detach().to("cpu", torch.float64).sort(descending=True).values * tokens


def _bin_means(values: Tensor) -> Tensor:
    """Average values by rank, (ranks,), over log-spaced bins; there are none without a rank."""
    ranks = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    bins = (ranks.log() / math.log(values.numel() + 1) * 60).long()
    sizes = torch.bincount(bins)
    return (torch.bincount(bins, values) / sizes)[sizes > 0]


def _bins_before_cliff(x: Tensor, y: Tensor) -> int:
    """Return the number of bins that come before y falls off a cliff."""
    head = max(10, math.ceil(0.6 * len(x)))  # a few features that always fire are not the law
    falls = -y.log().diff() > _CLIFF * x.log().diff()
    cliffs = falls[head:].nonzero()
    # The last bin before a fall may hold features from below the cliff already.
    return head + int(cliffs[0]) if len(cliffs) else len(x)


def _least_squares(x: Tensor, log_y: Tensor, *, largest_offset: float) -> tuple[float, float]:
    """Return s and q of the best `log y = a - s * log(x + q)`: a straight line for each q."""
    log_y = log_y - log_y.mean()
    low, high = 0.0, largest_offset**0.25  # small offsets matter more: search their fourth roots
    for _ in range(3):
        roots = torch.linspace(low, high, 41, dtype=torch.float64)
        log_x = (x + roots.unsqueeze(1) ** 4).log()  # (offsets, bins)
        log_x -= log_x.mean(1, keepdim=True)
        exponents = (-(log_x @ log_y) / log_x.square().sum(1)).clamp(_FLATTEST, _STEEPEST)
        best = int((log_y + exponents.unsqueeze(1) * log_x).square().sum(1).argmin())
        low, high = roots[max(best - 1, 0)].item(), roots[min(best + 1, 40)].item()
    return exponents[best].item(), min(roots[best].item() ** 4, largest_offset)


def _r2(values: Tensor, residual: Tensor) -> float:
    return 1 - (residual.square().sum() / (values - values.mean()).square().sum()).item()
