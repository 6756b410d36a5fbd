"""When each feature fired last, and how often it does: what tells the dead and the dying."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.core.exact_buffers import ExactBuffers
from lightning_sae.core.loading import require_finite
from lightning_sae.host_copy import HostCopy
from lightning_sae.parallel import Ranks

__all__ = ["FiringHistory"]


class FiringHistory(ExactBuffers):
    """Counts of a training run, equal on all ranks.

    Args:
        n_features: Size of the dictionary.
        dead_after_tokens: Tokens without a match after which a feature counts as dead.

    Attributes:
        tokens_seen: Tokens trained on, over all ranks, int64, 0-d.
        tokens_since_fired: For each feature, tokens since its last match, int64, (n_features,).
        density: For each feature, the share of tokens it was matched with, over about the last
            `dead_after_tokens` tokens, float32, (n_features,).
    """

    tokens_seen: Tensor
    tokens_since_fired: Tensor
    density: Tensor

    def __init__(self, n_features: int, dead_after_tokens: int) -> None:
        super().__init__()
        require_positive(dead_after_tokens=dead_after_tokens)
        self.dead_after_tokens = dead_after_tokens
        self._seen = HostCopy()
        self.register_buffer("tokens_seen", torch.tensor(0))
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64))
        self.register_buffer("density", torch.zeros(n_features, dtype=torch.float32))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse counts that no training leads to.

        Raises:
            UsageError: If one is negative.
        """
        require_finite(state, "tokens_seen", "tokens_since_fired", "density", least=0)

    @property
    def seen(self) -> int:
        """`tokens_seen` as a number, which does not wait for the device."""
        return int(self._seen.of(self.tokens_seen))

    @property
    def window(self) -> int:
        """Over how many tokens `density` is measured by now.

        Of densities that came with another library's SAE, over as many as the rarest feature needs.
        """
        seen = self.seen
        if seen == 0 and self.density.any():
            seen = math.ceil(1 / float(self.density[self.density > 0].min()))
        return min(seen, self.dead_after_tokens)

    def dead(self) -> Tensor:
        """Return which features have not fired for `dead_after_tokens`, bool, (n_features,)."""
        return self.tokens_since_fired >= self.dead_after_tokens

    @torch.no_grad()
    def update(self, fires: Tensor, tokens: int, ranks: Ranks) -> Tensor:
        """Count a batch, and return how many tokens it has on all ranks, int64, 0-d.

        Args:
            fires: Matches of each feature on this rank, int64, shape (n_features,).
            tokens: Tokens of this rank.
            ranks: Over which both are added up.
        """
        counts = torch.cat([fires, self.tokens_seen.new_full((1,), tokens)])
        fires, total_row = ranks.all_reduce(counts).split([len(fires), 1])
        total: Tensor = total_row.squeeze()
        self.tokens_seen += total
        self._seen.send(self.tokens_seen, self.tokens_seen)
        self.tokens_since_fired += total
        self.tokens_since_fired.masked_fill_(fires > 0, 0)
        # The mean over all tokens until there are dead_after_tokens of them, then a running one.
        window = self.tokens_seen.clamp(max=self.dead_after_tokens).maximum(total)
        # Quotients of integers would have the default dtype, which may have 16 bits. A batch
        # without tokens has no share in the mean.
        share = fires.float() / total.clamp_min(1)
        self.density.lerp_(share, total.float() / window.clamp_min(1))
        return total
