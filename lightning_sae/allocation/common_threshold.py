"""The one threshold above which a batch has as many pairs as a budget says."""

from typing import Literal

import torch
from torch import Tensor

from lightning_sae.allocation.across_ranks import total_length
from lightning_sae.allocation.affinities import Affinities, as_scores
from lightning_sae.allocation.mutual_choice import mutual_choice
from lightning_sae.parallel import Ranks


def common_threshold(affinities: Affinities, budget: int, *, ranks: Ranks | None = None) -> Tensor:
    """Return the smallest affinity that `mutual_choice` takes, without a gradient.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: As in `mutual_choice`, which also says what is raised.
        ranks: As in `mutual_choice`.

    Returns:
        0-d, the same on all ranks; zero if nothing is positive, or the budget is.

    Example:
        >>> common_threshold(torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]]), budget=3)
        tensor(1.)
    """
    chosen = mutual_choice(as_scores(affinities), budget, ranks=ranks).value
    smallest = torch.cat([chosen, chosen.new_tensor([torch.inf])]).min()
    if ranks is not None:
        smallest = ranks.all_reduce(smallest, "min")
    return smallest.nan_to_num(posinf=0.0)


def cut_above(
    values: Tensor, budget: int, *, least: float = 0.0, ranks: Ranks | None = None
) -> float:
    """Return what exactly `budget` of some values are above, of all ranks together.

    Args:
        values: Shape (pairs,), above `least` those that count. If these are no more than `budget`,
            all are above what is returned.
        budget: How many are to be above.
        least: What is returned is above it.
        ranks: As in `mutual_choice`.

    Returns:
        The midpoint of the last that is above and the first that is not, as rounding moves either a
        little. Of equal values that the budget would divide, all or none are above.

    Example:
        >>> round(cut_above(torch.tensor([1.0, 5.0, 3.0, 2.0]), 2), 4)
        2.5
    """

    def reduced(values: Tensor, reduction: Literal["min", "max"], empty: float) -> float:
        values = torch.cat([values, values.new_full((int(len(values) == 0),), empty)])
        own = values.amax() if reduction == "max" else values.amin()
        return float(own if ranks is None else ranks.all_reduce(own, reduction))

    most = 1.0 + reduced(values, "max", empty=least)
    for _ in range(100):  # bisection, until no value lies between
        middle = (least + most) / 2
        if total_length(values[values > middle], ranks) > budget:
            least = middle
        else:
            most = middle
    last = reduced(values[values > most], "min", empty=2 * most)
    return (most + last) / 2
