"""The weight of a sparsity penalty, found while a run goes on: a wanted L0 needs no sweep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sae.core.exact_buffers import ExactBuffers
from lightning_sae.core.loading import require_finite
from lightning_sae.parallel import Ranks

__all__ = ["PenaltyWeight"]


class PenaltyWeight(ExactBuffers):
    """Rises while tokens have more than k matches, and falls while they have fewer.

    A controller by the logarithm of how many times too many there are: a part in proportion to it,
    which answers at once, and a sum of all so far, which leaves no excess behind. Ours.

    Args:
        k: Matches a token that are wanted.

    Attributes:
        gain: Of the sum, a batch. With three times as much the weight swings at first; with a third
            a run of 300 batches ends with a quarter too few matches.
        weight: What the penalty is multiplied by now, float32, 0-d, NaN before the first batch.
        settled: The weight but for the part in proportion, float32, 0-d.
    """

    gain = 0.03
    weight: Tensor
    settled: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        for name in ("weight", "settled"):
            self.register_buffer(name, torch.tensor(torch.nan, dtype=torch.float32))

    @property
    def begun(self) -> bool:
        """Whether there is a weight by now."""
        return not bool(self.weight.isnan())

    def begin(self, weight: Tensor) -> None:
        """Set the weight that is adjusted from now on, 0-d."""
        for each in (self.weight, self.settled):
            each.copy_(weight)

    def forward(self, penalty: Tensor) -> Tensor:
        """Return a penalty, a mean over tokens, 0-d, with its weight: 0 before the first batch."""
        return self.weight.nan_to_num(0.0) * penalty

    @torch.no_grad()
    def observe(self, fires: Tensor, tokens: int, ranks: Ranks) -> None:
        """Adjust the weight to what a batch had; one without tokens says nothing.

        Args:
            fires: Matches of this rank, int64, 0-d.
            tokens: Tokens of this rank.
            ranks: Over which both are added up.
        """
        counts = ranks.all_reduce(torch.stack([fires, fires.new_tensor(tokens)])).float()
        if counts[1] == 0:
            return
        excess = (counts[0] / counts[1] / self.k).clamp(0.1, 10)
        self.settled.mul_(excess.pow(self.gain))
        self.weight.copy_(self.settled * excess)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse weights that no training leads to; before the first batch they are NaN."""
        if not all(bool(value.isnan()) for value in state.values()):
            require_finite(state, "weight", "settled", beyond=0)
