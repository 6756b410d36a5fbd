"""Matches made from a mask."""

from torch import Tensor

from lightning_sae.matches import Matches


def matches_where(affinities: Tensor, chosen: Tensor) -> Matches:
    """Gather the matches at the chosen pairs.

    Args:
        affinities: Encoder outputs, shape (tokens, features).
        chosen: Boolean mask of the same shape. Pairs without a positive affinity must be off.
    """
    token, feature = chosen.nonzero(as_tuple=True)
    tokens, features = affinities.shape
    return Matches(token, feature, affinities[token, feature], (tokens, features))
