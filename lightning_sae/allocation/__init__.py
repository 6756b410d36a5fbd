"""Choices of token-feature matches, as pure functions of affinities."""

from lightning_sae.allocation.choices import (
    feature_choice,
    midpoint_thresholds,
    mutual_choice,
    threshold_choice,
    token_choice,
)
from lightning_sae.allocation.importance import Importance, score
from lightning_sae.matches import Matches, matches_where
from lightning_sae.selection.scores import Scores, TensorScores

__all__ = [
    "Importance",
    "Matches",
    "Scores",
    "TensorScores",
    "feature_choice",
    "matches_where",
    "midpoint_thresholds",
    "mutual_choice",
    "score",
    "threshold_choice",
    "token_choice",
]
