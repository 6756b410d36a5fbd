"""Which activations are like most, and what their mean and spread are.

Transformers have a few tokens, attention sinks above all, whose residual stream is hundreds of
times as long as that of the others (Sun et al. 2024, arXiv 2402.17762). They are not to decide for
all the others what the origin and the scale of activations are.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lightning_sae.parallel import Ranks

__all__ = ["MASSIVE", "geometric_median", "is_massive", "mean_and_variance"]

MASSIVE: Final = 10.0
"""A token is massive that is more than so many times as far from the origin as is typical: the
multiple of the median norm beyond which `dictionary_learning` leaves tokens out."""

MOST_MASSIVE: Final = 1 / 8
"""Share of tokens that can be massive. Attention sinks are one in a context or fewer; where most
tokens are nearly alike, padding say, all others are far from their median."""

_ITERATIONS: Final = 20
"""Of Weiszfeld's method: from a mean that a tenth of the tokens, 1,000 times as long as the others,
has moved, six bring it back."""


def mean_and_variance(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the mean of the tokens that are not massive, and their mean squared distance from it.

    Massive are those more than `MASSIVE` times as far from the geometric median as the median
    token. Where there are none, as in most samples, this is the mean of all; and so it is where
    they are more than a share of `MOST_MASSIVE`, and it is the others that are unlike most.

    Args:
        x: Activations of this rank, float32 or wider, shape (tokens, d_model).
        ranks: Those that have tokens of the sample.

    Returns:
        Mean, shape (d_model,), and variance, 0-d, the same on all ranks. NaN where an activation is
        not finite.
    """
    distance = (x - geometric_median(x, ranks)).norm(dim=1)
    typical = torch.cat(ranks.all_gather(distance)).median()
    massive = distance > MASSIVE * typical  # which NaN is not, so that it is seen
    few = ranks.average(massive.to(x).mean().unsqueeze(0), len(x)) <= MOST_MASSIVE
    x = x[~(massive & few)]
    count = ranks.all_reduce(x.new_tensor(x.shape[0]))
    mean = ranks.all_reduce(x.sum(0)) / count
    return mean, ranks.all_reduce((x - mean).square().sum()) / count


def geometric_median(x: Tensor, ranks: Ranks) -> Tensor:
    """Return the point of least total distance from all tokens, to about a thousandth of theirs.

    It hardly moves for a few tokens, however far away. Found by Weiszfeld's method, from the mean.

    Args:
        x: Activations of this rank, shape (tokens, d_model).
        ranks: Those that have tokens of the sample.
    """
    weight = x.new_ones(len(x))
    for _ in range(_ITERATIONS + 1):
        sums = ranks.all_reduce(torch.cat([weight @ x, weight.sum().unsqueeze(0)]))
        centre = sums[:-1] / sums[-1]
        distance = (x - centre).norm(dim=1)
        weight = 1 / distance.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    return centre


@torch.no_grad()
def is_massive(centred: Tensor, multiple: float) -> Tensor:
    """Return which tokens are more than so many times as long as is typical, bool, (tokens,).

    Args:
        centred: Scaled activations less their mean, so that a mean square of 1 is typical, shape
            (tokens, d_model).
        multiple: How many times.
    """
    return centred.square().mean(1) > multiple**2
