"""How the code of a token follows from its affinities alone: what an SAE is to others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_sae.allocation import Importance
from lightning_sae.checks import UsageError

__all__ = ["Gate", "require_plain"]


@dataclass(frozen=True)
class Gate:
    """Which affinities of a token are its code; all others are zero, as are those not positive.

    Attributes:
        k: So many of the largest. None: as many as pass.
        threshold: Those above it, in the units of affinities: 0-d, or one a feature, (n_features,).
            None: all that are positive.
        gain: What affinities are multiplied by to make the code, (n_features,), before `offset` is
            added. None: affinities are the code.
        offset: See above, (n_features,).
        relative: Whether thresholds are for affinities divided by the length of the token that is
            encoded, less the origin (`importance="token_norm"`).
    """

    k: int | None = None
    threshold: Tensor | None = None
    relative: bool = False
    gain: Tensor | None = None
    offset: Tensor | None = None


def require_plain(importance: Importance) -> None:
    """Raise UsageError unless scores are affinities, but for a factor a token."""
    if importance == "gain":
        raise UsageError(
            f"importance={importance!r} depends on more than affinities: no gate can say it"
        )
