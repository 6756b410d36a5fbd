"""What each feature fires on, in one pass over tokens and memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.matches import Matches
from lightning_sae.report.histogram import ValueHistograms
from lightning_sae.report.largest import Largest

__all__ = ["AFTER", "BEFORE", "Examples", "FiringCollector", "Firings", "collect"]

BEFORE: Final = 24
AFTER: Final = 8
"""Tokens around a firing that are remembered: fewer after it, as they cannot be its cause."""


class Matching(Protocol):
    """What codes are taken from: any `SparseAutoencoder`."""

    n_features: int

    def match(self, x: Tensor, /) -> Matches:
        """Return the matches of activations (tokens, d_model)."""


@dataclass(frozen=True)
class Examples:
    """Firings of each feature, n at most, the strongest first.

    Attributes:
        place: Number of the context times the length of one, plus the position, int64,
            (n_features, n); -1 where there are fewer firings.
        values: The feature's values from `BEFORE` tokens before the firing to `AFTER` after it,
            float32, (n_features, n, BEFORE + 1 + AFTER); 0 where it does not fire, or the context
            has no such position.
    """

    place: Tensor
    values: Tensor

    @property
    def value(self) -> Tensor:
        """The value of each firing, float32, (n_features, n); 0 where there are fewer."""
        return self.values[..., BEFORE]


@dataclass(frozen=True)
class Firings:
    """What was found out of each feature.

    Attributes:
        tokens: Tokens that were read, but for those not kept.
        count: Tokens on which it fires, int64, (n_features,).
        mean: Its mean value on these, float32, (n_features,); 0 if there are none.
        histogram: How often its value was in each bin, int64, (n_features, bins).
        bin_width: Width of its bins, the first of which begins at 0, float32, (n_features,).
        top: The contexts in which it has the highest values, each at its highest.
        sample: Firings drawn at random, all equally likely.
    """

    tokens: int
    count: Tensor
    mean: Tensor
    histogram: Tensor
    bin_width: Tensor
    top: Examples
    sample: Examples

    @property
    def density(self) -> Tensor:
        """The share of tokens on which each feature fires, float64, (n_features,)."""
        return self.count.double() / max(1, self.tokens)


class FiringCollector:
    """Collects `Firings` batch by batch.

    Args:
        n_features: Size of the dictionary.
        top: Contexts to keep of each feature in which its values are highest.
        sample: Firings to keep of each feature, drawn at random.
        seed: Seed of the draw.
        device: Where everything is kept. About 5 KiB a feature.

    Raises:
        UsageError: If a number is not positive.
    """

    def __init__(
        self,
        n_features: int,
        *,
        top: int = 10,
        sample: int = 20,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        require_positive(n_features=n_features, top=top, sample=sample)
        self._tokens = 0
        self._count = torch.zeros(n_features, dtype=torch.int64, device=device)
        self._sum = torch.zeros(n_features, dtype=torch.float64, device=device)
        self._histograms = ValueHistograms(n_features, device)
        self._top = Largest(n_features, top, BEFORE + 1 + AFTER, device)
        self._sample = Largest(n_features, sample, BEFORE + 1 + AFTER, device)
        self._draw = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def update(self, kept: Tensor, matches: Matches, first: int) -> None:
        """Take in a batch of whole contexts.

        Args:
            kept: Which of their positions the matches are of: a bool mask, (contexts, length).
            matches: Of these positions, in their order.
            first: Number of the first of the contexts.
        """
        matches = matches.select(matches.value > 0)
        contexts, length = kept.shape
        spots = kept.flatten().nonzero().squeeze(1).to(matches.token.device)[matches.token]
        identity = matches.feature * (contexts * length) + spots
        identity, order = identity.sort()
        spots, feature, value = spots[order], matches.feature[order], matches.value[order].float()

        self._tokens += matches.shape[0]
        self._count += matches.per_feature()
        self._sum.index_add_(0, feature, value.double())
        self._histograms.update(feature, value)

        offsets = torch.arange(-BEFORE, AFTER + 1, device=spots.device)

        def windows(chosen: Tensor) -> Tensor:
            wanted = identity[chosen].unsqueeze(1) + offsets
            found = torch.searchsorted(identity, wanted).clamp(max=len(identity) - 1)
            at = spots[chosen].unsqueeze(1) % length + offsets
            fires = (identity[found] == wanted) & (at >= 0) & (at < length)
            return value[found].where(fires, 0.0)

        place = first * length + spots
        peaks = _first_maxima(feature * contexts + spots // length, value)
        self._top.offer(
            feature[peaks], value[peaks], place[peaks], lambda chosen: windows(peaks[chosen])
        )
        lots = torch.rand(
            len(value), generator=self._draw, dtype=torch.float64, device=value.device
        )
        self._sample.offer(feature, lots, place, windows)

    def result(self) -> Firings:
        """Return what was collected so far, on the CPU."""
        mean = self._sum / self._count.clamp_min(1)
        top, sample = self._top.by_key(), self._sample.by_column(BEFORE)
        return Firings(
            tokens=self._tokens,
            count=self._count.cpu(),
            mean=mean.float().cpu(),
            histogram=self._histograms.counts.cpu(),
            bin_width=self._histograms.widths().cpu(),
            top=Examples(*(each.cpu() for each in top)),
            sample=Examples(*(each.cpu() for each in sample)),
        )


def collect(
    sae: Matching,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Firings:
    """Return what each feature fires on in held-out batches.

    Args:
        sae: Any SAE of this package, or what has `n_features` and `match`.
        batches: Mappings with `activations`, (tokens, d_model), of the positions that `kept` marks,
            (contexts, length), and the number of the first context as `first`, as the data modules'
            `test_dataloader` yields them.
        device: Where the SAE is.
        options: Those of `FiringCollector`.
    """
    collector = FiringCollector(sae.n_features, device=device, **options)
    with torch.inference_mode():
        for batch in batches:
            matches = sae.match(batch["activations"].to(device))
            collector.update(batch["kept"], matches, batch["first"])
    return collector.result()


def _first_maxima(group: Tensor, value: Tensor) -> Tensor:
    """Return the place of the first largest value of each group.

    Args:
        group: The group of each value, equal ones side by side, int64, (values,).
        value: (values,).
    """
    _, numbers = group.unique_consecutive(return_inverse=True)
    groups = int(numbers[-1]) + 1 if len(numbers) else 0
    largest = value.new_zeros(groups).scatter_reduce_(0, numbers, value, "amax")
    maxima = (value == largest[numbers]).nonzero().squeeze(1)
    is_first = torch.ones_like(maxima, dtype=torch.bool)
    is_first[1:] = numbers[maxima][1:] != numbers[maxima][:-1]
    return maxima[is_first]
