"""What a report says, whatever it is written as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from lightning_sae.metrics.zipf import dying_features
from lightning_sae.report.collect import AFTER, BEFORE, Examples, Firings
from lightning_sae.report.logit_lens import LogitLens
from lightning_sae.zipf import ZipfFitError, ZipfMandelbrot, fit_zipf

__all__ = ["QUARTERS", "FeatureReport", "Windows", "windows_of"]

QUARTERS: Final = 4
STATES: Final = ("live", "dying", "dead")


@dataclass(frozen=True)
class Windows:
    """Examples with the text around them, one after another: by feature, the strongest first.

    Attributes:
        feature: Whose example it is, int64, (examples,).
        rank: Its place among those of the feature, from 0, int64, (examples,).
        context: Number of its context, int64, (examples,).
        position: Where in the context the feature fires, int64, (examples,).
        token_ids: From `BEFORE` tokens before to `AFTER` after, int64, (examples, window); -1 where
            the context has no such position.
        values: The feature's values there, float32, (examples, window).
    """

    feature: Tensor
    rank: Tensor
    context: Tensor
    position: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class FeatureReport:
    """All that is known of an SAE's features.

    Attributes:
        title: What the SAE is, in a line.
        about: What else there is to say of it, in groups of names and values.
        firings: What each feature fires on.
        contexts: The tokens that were read, (contexts, length) int64.
        text_of: Returns the texts of token ids.
        lens: What its direction does in the model's output. None: the model has none.
        nearest: The nearest features and their cosines, both (n_features, n).
    """

    title: str
    about: dict[str, dict[str, Any]]
    firings: Firings
    contexts: Tensor
    text_of: Callable[[list[int]], list[str]]
    lens: LogitLens | None
    nearest: tuple[Tensor, Tensor]

    @cached_property
    def law(self) -> ZipfMandelbrot | None:
        """The law that the densities follow; None if too few features fire for a fit."""
        try:
            return fit_zipf(self.firings.density, max(1, self.firings.tokens))
        except ZipfFitError:
            return None

    @cached_property
    def state(self) -> list[str]:
        """Whether each feature is live, dying or dead, by the tokens that were read."""
        firings = self.firings
        dying = torch.zeros_like(firings.count)
        if self.law is not None:
            dying = dying_features(firings.density, firings.tokens, self.law).long()
        return [STATES[i] for i in dying.masked_fill(firings.count == 0, 2).tolist()]

    @cached_property
    def top(self) -> Windows:
        """The contexts in which each feature has its highest values."""
        return windows_of(self.firings.top, self.contexts)

    @cached_property
    def sample(self) -> Windows:
        """Firings of each feature drawn at random."""
        return windows_of(self.firings.sample, self.contexts)

    @cached_property
    def sample_quarter(self) -> Tensor:
        """To which quarter of its feature's sample each belongs, from 0, the strongest."""
        drawn = (self.firings.sample.place >= 0).sum(1)
        return self.sample.rank * QUARTERS // drawn[self.sample.feature]

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of each token that the report shows, and of no others."""
        shown = [self.top.token_ids, self.sample.token_ids]
        if self.lens is not None:
            shown += [self.lens.promoted, self.lens.demoted]
        ids = torch.cat([each.flatten() for each in shown]).unique()
        ids = ids[ids >= 0].tolist()
        return dict(zip(ids, self.text_of(ids), strict=True))


def windows_of(examples: Examples, contexts: Tensor) -> Windows:
    """Return examples with the text around them.

    Args:
        examples: Of each feature.
        contexts: The tokens that were read, (contexts, length) int64.
    """
    feature, rank = (examples.place >= 0).nonzero(as_tuple=True)
    length = contexts.shape[1]
    place = examples.place[feature, rank]
    context, position = place // length, place % length
    at = position.unsqueeze(1) + torch.arange(-BEFORE, AFTER + 1)
    inside = (at >= 0) & (at < length)
    ids = contexts[context.unsqueeze(1), at.clamp(0, length - 1)]
    values = examples.values[feature, rank]
    return Windows(feature, rank, context, position, ids.where(inside, -1), values)
