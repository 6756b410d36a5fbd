"""Budgets of features: how the matches of a batch are shared out among them.

Ayonrinde 2024 (arXiv 2411.02124) sets them by a Zipf distribution; the offset, the bounds and the
rounding are this library's reconstruction.
"""

import math

import torch
from torch import Tensor

from lightning_sae.checks import UsageError

__all__ = ["round_budgets", "shared_out", "zipf_budgets"]


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
    if n_features < 1 or not min(exponent, offset) >= 0:
        raise UsageError(f"{n_features=} must be > 0, and {exponent=}, {offset=} >= 0")
    law = (torch.arange(1, n_features + 1, dtype=torch.float64) + offset) ** -exponent
    return shared_out(total, law, minimum=minimum, maximum=maximum)


def shared_out(total: float, weights: Tensor, *, maximum: float, minimum: float = 0.0) -> Tensor:
    """Share out `total` matches in proportion to weights, within bounds.

    `clip(C * weight, minimum, maximum)` with C such that they sum to `total`.

    Args:
        total: Matches to share out, E[k] times the tokens of a batch.
        weights: One a feature, positive, `(features,)`.
        maximum: Largest budget, in matches.
        minimum: Smallest budget, in matches.

    Returns:
        Real budgets, `(features,)`, float64 on the device of the weights.

    Raises:
        ValueError: If no budgets within the bounds sum to `total`, or a bound is out of range.

    Example:
        >>> shared_out(10, torch.tensor([6.0, 3.0, 0.5, 0.5]), maximum=5, minimum=1)
        tensor([5., 3., 1., 1.], dtype=torch.float64)
    """
    n_features = weights.numel()
    if maximum == math.inf or not minimum >= 0:
        raise UsageError(f"{maximum=} must be finite, and {minimum=} >= 0")
    if not minimum <= (share := total / n_features) <= maximum:
        raise UsageError(
            f"{total=} matches cannot be shared by {n_features=} within {minimum=} .. {maximum=} "
            f"each: a total (k times the tokens of a batch) of {n_features * minimum} .. "
            f"{n_features * maximum} can be, or any bounds with minimum <= {share} <= maximum"
        )
    weights = weights.to(torch.float64)
    low, high, scale = weights.new_tensor(0.0), maximum / weights.min(), total / weights.sum()
    for _ in range(200):  # Newton's steps, or halving where they leave the bracket
        budgets = (weights * scale).clamp(minimum, maximum)
        missing = total - budgets.sum()
        if missing.abs() <= 1e-13 * total:
            break
        low, high = (scale, high) if missing > 0 else (low, scale)
        newton = scale + missing / weights[(budgets > minimum) & (budgets < maximum)].sum()
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
