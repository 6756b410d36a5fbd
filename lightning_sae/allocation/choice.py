"""What a choice found."""

from typing import NamedTuple

from torch import Tensor

from lightning_sae.matches import Matches


class Choice(NamedTuple):
    """Matches, and what was counted in the pass over all scores that found them.

    Attributes:
        matches: The chosen pairs. From `Scores`, their values are scores.
        passing: How many tokens of this rank score above each feature's threshold, int64, shape
            (features,); None where there are no such thresholds.
    """

    matches: Matches
    passing: Tensor | None = None
