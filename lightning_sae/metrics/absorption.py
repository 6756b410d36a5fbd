"""Whether special features swallow general ones."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import widest_float

_AT_ONCE: Final = 1 << 22  # entries of a table of pairs and features


class FeatureAbsorption(TotalsMetric):
    r"""How often a concept is there, its own feature is silent, and others stand in for it.

    Where a special concept implies a general one, an SAE saves a match by a feature that says both,
    and its feature of the general one then has holes (Chanin et al. 2024, arXiv 2409.14507). Both
    scores are SAEBench's (`feature_absorption_calculator.py`), with its constants. There a concept
    is the direction d of a probe, and its main features are those that predict the probe best; here
    d is true, and the main feature m the learned one whose direction is nearest to it. On a token x
    that has the concept, with codes z and c_j = cos(d, w_j):

    * `absorption`: 1 if m does not fire, and of all features that of largest z_j c_j has
      c_j >= 0.025 and z_j c_j >= 0.4 d x, with d x >= 0; else 0.
    * `absorption_fraction`: let a be the sum of the three largest z_j c_j > 0 of features other
      than m with c_j >= 0.1. It is 0 if z_m c_m >= d x or a < 0.4 d x; 1 if z_m c_m <= 0; otherwise
      b / (b + z_m c_m) with b = min(a, d x - z_m c_m).

    Both are averaged over the tokens that have a concept, and then over concepts.

    ``update`` takes codes in the units of the activations, the activations, and which concepts
    tokens have. ``compute`` returns both as float32 scalars; NaN before a concept was there.

    Attributes:
        main: The main feature of each concept, int64, (concepts,).
        absorbed: Tokens on which it was fully absorbed, on this rank, int64, (concepts,).
        fraction: Sum of fractions, float64, (concepts,).
        tokens: Tokens that have the concept, int64, (concepts,).

    Args:
        learned: Rows of the decoder, (n_features, d_model).
        concepts: True directions of the general concepts, (concepts, d_model).
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Raises:
        UsageError: If shapes do not fit each other.

    Example:
        >>> learned = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # "animal", "animal and dog"
        >>> metric = FeatureAbsorption(learned, concepts=torch.tensor([[1.0, 0.0]]))
        >>> token, feature = torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> codes = Matches(token, feature, torch.tensor([1.0, 1.5]), (2, 2))
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> metric.update(codes, x, Matches(token, token * 0, torch.ones(2), (2, 1)))
        >>> metric.compute()  # of two tokens with an animal, that of the dog is left to "dog"
        {'absorption': tensor(0.5000), 'absorption_fraction': tensor(0.5000)}
    """

    higher_is_better = False
    share = 0.4
    least_cosine = 0.025
    least_cosine_of_several = 0.1
    several = 3
    absorbed: Tensor
    fraction: Tensor
    tokens: Tensor

    def __init__(self, learned: Tensor, concepts: Tensor, **kwargs: Any) -> None:
        if learned.shape[1:] != concepts.shape[1:]:
            shapes = f"{tuple(learned.shape)} and {tuple(concepts.shape)}"
            raise UsageError(f"directions of shapes {shapes} must both be (directions, d_model)")
        super().__init__(**kwargs)
        directions = functional.normalize(concepts.detach().float(), dim=1)
        cosines = directions @ functional.normalize(learned.detach().float(), dim=1).T
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("cosines", cosines, persistent=False)  # (concepts, n_features)
        self.directions: Tensor
        self.cosines: Tensor
        self.main: Tensor
        self.register_buffer("main", cosines.argmax(1), persistent=False)
        self.add_total("absorbed", len(concepts))
        self.add_total("fraction", len(concepts), dtype=torch.float64)
        self.add_total("tokens", len(concepts))

    def update(self, codes: Matches, activations: Tensor, concepts: Matches) -> None:
        """Add a batch.

        Args:
            codes: Of its tokens, (tokens, n_features), such that values times unit directions are
                in the units of the activations.
            activations: (tokens, d_model).
            concepts: Where each concept is there, (tokens, concepts), on the same device.
        """
        tokens = len(activations)
        shapes = codes.shape, concepts.shape
        if shapes != ((tokens, self.cosines.shape[1]), (tokens, len(self.cosines))):
            raise UsageError(
                f"codes and concepts of shapes {shapes[0]} and {shapes[1]} must be those of "
                f"{tokens} tokens, (tokens, n_features) and (tokens, concepts)"
            )
        dense = codes.to_dense().detach().float()
        here = concepts.select(concepts.value > 0)
        size = max(1, _AT_ONCE // dense.shape[1])
        for token, concept in zip(here.token.split(size), here.feature.split(size), strict=True):
            projection = (activations[token].float() * self.directions[concept]).sum(1)
            both = self._absorbed(dense[token], concept, projection)
            self._add(concept, *both)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean over concepts of both scores."""
        seen = self.tokens > 0
        tokens = self.tokens[seen].to(widest_float(self.tokens.device))
        return {
            "absorption": (self.absorbed[seen] / tokens).mean().float(),
            "absorption_fraction": (self.fraction[seen] / tokens).mean().float(),
        }

    def _absorbed(
        self, codes: Tensor, concept: Tensor, projection: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return, for pairs of a token and its concept, whether it is absorbed, and the fraction.

        Args:
            codes: Those of the token, (pairs, n_features).
            concept: Number of the concept, (pairs,).
            projection: Of the activation on its direction, (pairs,).
        """
        cosines, main = self.cosines[concept], self.main[concept].unsqueeze(1)
        parts = codes * cosines  # (pairs, n_features)
        needed = self.share * projection
        top, place = parts.max(1)
        aligned = cosines.gather(1, place.unsqueeze(1)).squeeze(1) >= self.least_cosine
        silent = codes.gather(1, main).squeeze(1) == 0
        absorbed = silent & aligned & (projection >= 0) & (top >= needed)

        own = parts.gather(1, main).squeeze(1)
        others = parts.where(cosines >= self.least_cosine_of_several, 0).clamp(min=0)
        others = others.scatter(1, main, 0.0)
        several = others.topk(min(self.several, others.shape[1])).values.sum(1)
        by_others = several.minimum(projection - own)
        fraction = (by_others / (by_others + own)).clamp(0, 1).where(own > 0, 1.0)
        none = (own >= projection) | (several / projection < self.share)
        return absorbed, fraction.masked_fill(none, 0.0)

    def _add(self, concept: Tensor, absorbed: Tensor, fraction: Tensor) -> None:
        count = len(self.tokens)
        fractions = torch.zeros_like(self.fraction)
        self.add_to_totals(
            absorbed=torch.bincount(concept[absorbed], minlength=count),
            fraction=fractions.index_add_(0, concept, fraction.to(fractions)),
            tokens=torch.bincount(concept, minlength=count),
        )
