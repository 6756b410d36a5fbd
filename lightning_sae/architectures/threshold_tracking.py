"""How the thresholds of features that choose keep them to their budgets."""

from torch import Tensor

__all__ = ["track"]

_LEAST = 1e-3  # a threshold that sank to zero could not rise again in proportion
_MISSED = 20  # matches in a row: chance alone does not explain that
_FARTHEST = 0.5  # a logarithm: no batch moves a threshold further


def track(
    thresholds: Tensor,
    passing: Tensor,
    budgets: Tensor,
    missed: Tensor,
    *,
    tracking: float,
    patience: float,
) -> None:
    """Move each threshold, in place, towards the one that as many tokens pass as a budget allows.

    Args:
        thresholds: One a feature, float32, shape (n_features,), as are all that follow.
        passing: How many tokens of a batch are above them, int64.
        budgets: How many are to be, real numbers.
        missed: How many matches each feature's budget has had since it fired.
        tracking: As for `FeatureChoiceSAE`.
        patience: As for `FeatureChoiceSAE`; there is none with features that do not fire at all.
    """
    # In proportion, because scores have no unit of their own; and by all of the excess, or rare
    # features, whose counts are the most uneven, would fire too often.
    memory = patience * (missed < _MISSED) + budgets / tracking
    step = ((passing - budgets) / memory.clamp_min(_LEAST)).clamp(max=_FARTHEST)  # of no tokens
    thresholds.mul_(step.exp()).clamp_min_(_LEAST)
