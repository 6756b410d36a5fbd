"""The engine of every choice: the largest scores of all pairs of a batch, found a tile at a time.

`Scores` compute tiles; one pass over them keeps the few pairs among which a choice is made. In all
of it `at_least` and `bounds` mean >=, `above` and `thresholds` mean strictly >.
"""

from lightning_sae.selection.candidates import (
    candidates_of_batch,
    largest_of_each_feature,
    largest_of_each_token,
    pairs_above,
)
from lightning_sae.selection.ranking import (
    among_largest,
    among_largest_pairs,
    largest_pairs,
    places,
)
from lightning_sae.selection.scores import Scores, TensorScores
from lightning_sae.selection.search import Search

__all__ = [
    "Scores",
    "Search",
    "TensorScores",
    "among_largest",
    "among_largest_pairs",
    "candidates_of_batch",
    "largest_of_each_feature",
    "largest_of_each_token",
    "largest_pairs",
    "pairs_above",
    "places",
]
