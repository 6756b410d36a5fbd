"""What a rule is given and gives back: affinities as a tensor, or as scores read by the tile."""

from typing import TypeAlias

from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.selection import Scores, TensorScores

Affinities: TypeAlias = Tensor | Scores


def as_scores(affinities: Affinities) -> Scores:
    """Return what a choice reads: a tensor is given the interface of scores.

    Raises:
        ValueError: If a tensor is not two-dimensional.
    """
    return affinities if isinstance(affinities, Scores) else TensorScores(affinities)


def valued(chosen: Matches, affinities: Affinities) -> Matches:
    """Give matches, so far with their scores, the affinities of a tensor, type and gradient too."""
    if isinstance(affinities, Tensor):
        chosen.value = affinities[chosen.token, chosen.feature]
    return chosen
