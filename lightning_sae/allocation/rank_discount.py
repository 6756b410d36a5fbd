"""What a match is worth beside the larger ones of its token: a discount for crowded tokens.

Features of a token with many matches overlap, so that its weakest explain less than their
affinities say, and less than those of other tokens. The rules that rank pairs of several tokens can
allow for it. Ours: Ayonrinde 2024 (arXiv 2411.02124) names the assumption that a larger affinity
always matters more as a limitation (the Monotonic Importance Heuristic), and BatchTopK makes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.selection import places


@dataclass(frozen=True)
class RankDiscount:
    """Beyond a token's k-th largest score, the r-th counts `(k / r) ** exponent` of itself.

    What is chosen of a token are still its largest scores; the discount decides how many. Between
    two rules, which it contains, it goes from mutual choice (0) towards token choice (infinity).

    Attributes:
        k: How many scores of a token count in full.
        exponent: How fast the rest fall off.

    Example:
        >>> RankDiscount(k=2)(torch.tensor([0, 0, 0, 1]), torch.tensor([5.0, 4.0, 3.0, 3.0]))
        tensor([5., 4., 2., 3.])
    """

    k: int
    exponent: float = 1.0

    def __call__(self, token: Tensor, score: Tensor) -> Tensor:
        """Return what scores are worth, shape (pairs,).

        Args:
            token: Of each pair, int64, shape (pairs,). Of equal scores of a token the first comes
                first.
            score: Positive, shape (pairs,). None may be missing that is larger, in its token, than
                one that is given.
        """
        return score * self.share(token, score)

    def share(self, token: Tensor, score: Tensor) -> Tensor:
        """Return which share of themselves scores are worth, shape (pairs,), at most 1."""
        order, place = places(token, score)
        shares = (self.k / (place + 1).to(score.dtype)).clamp(max=1) ** self.exponent
        return torch.empty_like(score).index_put((order,), shares)
