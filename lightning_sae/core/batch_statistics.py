"""What is logged of a training batch: the same over however many ranks its tokens are spread."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.numerics import widest_float
from lightning_sae.parallel import Ranks

__all__ = ["batch_statistics", "require_new_names"]

NAMES = frozenset(
    ("loss", "l0", "l0_std", "fvu", "dead_fraction", "massive_fraction", "tokens", "threshold")
)
"""What is logged of every batch; terms of a loss have other names."""


def require_new_names(terms: Iterable[str], of: object) -> None:
    """Refuse a term of a loss by the name of something else that is logged: it would be lost.

    Args:
        terms: Names of the terms.
        of: Whose `extra_losses` they are.

    Raises:
        UsageError: If one has such a name.
    """
    for name in NAMES.intersection(terms):
        raise UsageError(
            f"extra_losses of {type(of).__name__} has a term {name!r}, which is the name of "
            "another figure: call it otherwise"
        )


@torch.no_grad()
def batch_statistics(
    terms: dict[str, Tensor],
    matches: Matches,
    scaled: Tensor,
    error: Tensor,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Return the terms of the loss, `l0` and its spread `l0_std`, and `fvu`, of all ranks' tokens.

    Ranks send each other one message, however many terms there are.

    Args:
        terms: Means over this rank's tokens, 0-d, by name; the same names on every rank.
        matches: Those of this rank's tokens.
        scaled: Scaled activations of this rank, shape (tokens, d_model).
        error: `scaled` less its reconstruction, shape (tokens, d_model).
        ranks: Those that have tokens of the batch, however many each. Default: this one alone.

    Returns:
        0-d tensors, the same on all ranks. `fvu` is NaN where activations do not vary,
        and means are where there are no tokens.
    """
    firings, mean = matches.per_token().float(), scaled.mean(0)
    squared_error, variation = error.square().sum(), (scaled - mean).square().sum()
    if ranks is not None and ranks.size > 1:
        return _over_ranks(terms, firings, mean, squared_error, variation, ranks)
    return {
        **terms,
        "l0": firings.mean(),
        "l0_std": firings.std(correction=0) if len(firings) else firings.mean(),
        "fvu": _share(squared_error, variation),
    }


def _over_ranks(
    terms: dict[str, Tensor],
    firings: Tensor,
    mean: Tensor,
    squared_error: Tensor,
    variation: Tensor,
    ranks: Ranks,
) -> dict[str, Tensor]:
    tokens, wide = len(firings), widest_float(mean.device)
    firings, mean = firings.to(wide), mean.to(wide)
    # Means over tokens, by which ranks can be averaged: also those of squares, for what varies.
    length = variation / tokens + mean.square().sum()
    own = [*terms.values(), firings.mean(), firings.square().mean(), squared_error / tokens, length]
    means = ranks.average(torch.cat([torch.stack([o.to(wide) for o in own]), mean]), tokens)
    *losses, l0, squared_l0, squared_error, length = means[: len(own)].unbind()
    found = dict(zip(terms, losses, strict=True))
    found["l0"], found["l0_std"] = l0, (squared_l0 - l0.square()).clamp_min(0).sqrt()
    found["fvu"] = _share(squared_error, length - means[len(own) :].square().sum())
    return {name: value.to(variation) for name, value in found.items()}


def _share(squared_error: Tensor, variation: Tensor) -> Tensor:
    return squared_error / variation.where(variation > 0, torch.nan)
