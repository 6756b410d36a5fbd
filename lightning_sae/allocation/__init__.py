"""Rules that spend a budget of token-feature matches, one a file, as pure functions.

All take affinities (tokens, features) and return the matches of largest total affinity that the
rule's budget allows (Ayonrinde 2024, arXiv 2411.02124, calls the assumption behind it, that a
larger affinity matters more, the Monotonic Importance Heuristic):

* token choice: every token takes at most k features (TopK);
* mutual choice: the batch takes at most M pairs, anywhere (the allocation of BatchTopK);
* feature choice: feature i takes at most m_i tokens (expert choice, seen from the features);
* threshold choice: a token takes what is above thresholds, whatever the rest of its batch is.

A pair without a positive affinity is never a match, so a budget may remain partly unspent. Among
equal affinities the lower token index wins, then the lower feature index. The choice itself is
made in float32 or wider and carries no gradient; gradients flow through the matches' values.

Affinities are a tensor, or `Scores` that are computed a tile at a time. Then no tokens x features
are ever in memory, and the matches' values are their scores. Rules whose budgets span tokens take
`ranks`, the processes whose tokens share the budgets: `across_ranks` says how.
"""

from lightning_sae.allocation.budgets import round_budgets, shared_out, zipf_budgets
from lightning_sae.allocation.choice import Choice
from lightning_sae.allocation.common_threshold import common_threshold, cut_above
from lightning_sae.allocation.feature_choice import feature_choice, feature_choice_counting
from lightning_sae.allocation.importance import Importance, score
from lightning_sae.allocation.mutual_choice import mutual_choice
from lightning_sae.allocation.rank_discount import RankDiscount
from lightning_sae.allocation.threshold_choice import (
    midpoint_thresholds,
    scaled_thresholds,
    threshold_choice,
)
from lightning_sae.allocation.token_choice import token_choice
from lightning_sae.matches import Matches
from lightning_sae.selection import Scores, TensorScores

__all__ = [
    "Choice",
    "Importance",
    "Matches",
    "RankDiscount",
    "Scores",
    "TensorScores",
    "common_threshold",
    "cut_above",
    "feature_choice",
    "feature_choice_counting",
    "midpoint_thresholds",
    "mutual_choice",
    "round_budgets",
    "scaled_thresholds",
    "score",
    "shared_out",
    "threshold_choice",
    "token_choice",
    "zipf_budgets",
]
