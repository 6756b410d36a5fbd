"""How the code of a token follows from its affinities alone: what an SAE is to others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.allocation import Importance, RankDiscount
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
        discount: What affinities count for beside others of their token, all as multiples of their
            thresholds, where they are compared with these. None: all in full.
    """

    k: int | None = None
    threshold: Tensor | None = None
    relative: bool = False
    gain: Tensor | None = None
    offset: Tensor | None = None
    discount: RankDiscount | None = None

    def cut(self, affinities: Tensor, length: Tensor) -> Tensor:
        """Return the most that is in no code: what the dense code of tokens is above.

        Args:
            affinities: Shape (..., n_features).
            length: Of each token, less the origin, shape (..., 1).

        Returns:
            What can be broadcast to the affinities' shape, never negative. Of a gate with `k` it is
            the k-th largest affinity, which is in the code.
        """
        if self.k is not None:
            return affinities.topk(self.k).values[..., -1:].clamp_min(0)
        if self.threshold is None:
            return affinities.new_zeros(())
        cut = (self.threshold.to(affinities) * (length if self.relative else 1)).clamp_min(0)
        if self.discount is None:
            return cut
        return cut / self.discount.shares(affinities / cut.clamp_min(torch.finfo(cut.dtype).tiny))


def require_plain(importance: Importance) -> None:
    """Raise UsageError unless scores are affinities, but for a factor a token."""
    if importance == "gain":
        raise UsageError(
            f"importance={importance!r} depends on more than affinities: no gate can say it"
        )
