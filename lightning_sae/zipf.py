"""The Zipf-Mandelbrot law of feature densities: fit it, spend a budget along it, find the dying.

Sorted by density, the share of tokens on which a feature fires, all but the rarest features follow
`scale / (rank + offset) ** exponent` (Ayonrinde 2024, arXiv 2411.02124), and Feature Choice budgets
along that law. The paper fits a Zipf law; the estimator, the offset, the bounds on budgets and the
definition of dying features are this library's reconstruction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.checks import UsageError

__all__ = [
    "DYING_BELOW",
    "ZipfFitError",
    "ZipfMandelbrot",
    "fit_zipf",
    "round_budgets",
    "zipf_budgets",
    "zipf_deficit",
]

FEWEST_FIRINGS = 20
"""Fewer are not judged by: the noise of a smaller count exceeds 22 %."""

DYING_BELOW = 0.75
"""A feature is dying if it is alive and below this share of the density the law gives its rank.

A reconstruction: the paper's definition was not available. The auxiliary loss helps features below
this share by default (`dying_below`), as helping those below 3/4 left fewer of them than helping
those below 1/2; `dying_fraction` counts by the same number, at ranks where the law expects
`FEWEST_FIRINGS` at least.
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
    order = density.argsort(descending=True, stable=True)
    expected = torch.empty(density.shape, dtype=torch.float64, device=density.device)
    expected[order] = law.density(torch.arange(1, density.numel() + 1)).to(density.device)
    return (1 - density / expected).clamp(0, 1).float()


def zipf_budgets(
    total: float,
    n_features: int,
    *,
    maximum: float,
    minimum: float = 1.0,
    exponent: float = 1.0,
    offset: float | None = None,
) -> Tensor:
    """Share out `total` matches along a Zipf-Mandelbrot law, within bounds.

    `budget(rank) = clip(C / (rank + offset) ** exponent, minimum, maximum)` with C such that they
    sum to `total`. Without bounds the first budgets may well exceed the tokens of a batch.

    Args:
        total: Matches to share out, E[k] times the tokens of a batch.
        n_features: Number of features.
        maximum: Largest budget, in matches; at most the tokens of a batch. Where the law alone
            would give the first features more, the others get what is left.
        minimum: Smallest budget, in matches. At 1 every feature fires in every batch; one of 0.25
            fires in a quarter of them, if rounded by `round_budgets`.
        exponent: Slope of the law; 0 gives every feature the same.
        offset: Rank below which the law flattens; `n_features / 1000` if not given.

    Returns:
        Real budgets by rank, largest first, `(n_features,)`, float64.

    Raises:
        ValueError: If no budgets within the bounds sum to `total`, or an argument is negative.

    Example:
        >>> zipf_budgets(100, 5, maximum=40, minimum=10, offset=0.0)
        tensor([40.0000, 23.0769, 15.3846, 11.5385, 10.0000], dtype=torch.float64)
    """
    offset = n_features / 1000 if offset is None else offset
    if n_features < 1 or maximum == math.inf or not min(minimum, exponent, offset) >= 0:
        raise UsageError(
            f"{n_features=} must be > 0, {maximum=} finite, and {minimum=}, {exponent=}, {offset=} "
            ">= 0"
        )
    if not minimum <= (share := total / n_features) <= maximum:
        raise UsageError(
            f"{total=} matches cannot be shared by {n_features=} within {minimum=} .. {maximum=} "
            f"each: a total (k times the tokens of a batch) of {n_features * minimum} .. "
            f"{n_features * maximum} can be, or any bounds with minimum <= {share} <= maximum"
        )
    law = (torch.arange(1, n_features + 1, dtype=torch.float64) + offset) ** -exponent
    low, high, scale = law.new_tensor(0.0), maximum / law[-1], total / law.sum()
    for _ in range(200):  # Newton's steps, or halving where they leave the bracket
        budgets = (law * scale).clamp(minimum, maximum)
        missing = total - budgets.sum()
        if missing.abs() <= 1e-13 * total:
            break
        low, high = (scale, high) if missing > 0 else (low, scale)
        newton = scale + missing / law[(budgets > minimum) & (budgets < maximum)].sum()
        scale = newton if low < newton < high else (low + high) / 2
    return budgets


def round_budgets(budgets: Tensor, seed: int) -> Tensor:
    """Round real budgets to integers at random, unbiased and with the same sum.

    Systematic sampling: fractional parts lie end to end in random order, and marks at equal
    distances from one random start pick those that round up.

    Args:
        budgets: Real budgets, `(features,)`, not negative, whose sum is a whole number.
        seed: Equal seeds give equal roundings; take a new one for every batch.

    Returns:
        Integer budgets, `(features,)`, int64, each the floor or the ceiling of its real value.

    Raises:
        ValueError: If a budget is negative or not finite, or their sum is not a whole number.

    Example:
        >>> round_budgets(torch.tensor([2.5, 1.0, 0.25, 0.25]), seed=0)
        tensor([2, 1, 1, 0])
    """
    budgets = budgets.to(torch.float64)
    total = budgets.sum().item()
    if not (math.isfinite(total) and budgets.min() >= 0 and abs(total - round(total)) < 1e-6):
        raise UsageError(f"budgets must be >= 0 and sum to a whole number, but sum to {total!r}")
    whole = budgets.floor()
    marks = round(total) - int(whole.sum())
    random = torch.Generator(budgets.device).manual_seed(seed)
    order = torch.randperm(budgets.numel(), generator=random, device=budgets.device)
    start = 1 - torch.rand((), generator=random, dtype=torch.float64, device=budgets.device)
    ends = (budgets - whole)[order].cumsum(0)
    # Marks lie in (0, end of the last part], so each falls into a part that is not empty.
    places = (torch.arange(marks, device=budgets.device) + start) / max(marks, 1) * ends[-1]
    picked = order[torch.searchsorted(ends, places)]
    return whole.long() + torch.bincount(picked, minlength=budgets.numel())


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
