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
        return torch.empty_like(score).index_put((order,), self._of_places(place.to(score.dtype)))

    def shares(self, scores: Tensor) -> Tensor:
        """Return the same of all scores of tokens, both of shape (..., features).

        Example:
            >>> RankDiscount(k=1).shares(torch.tensor([[3.0, 5.0, 4.0]]))
            tensor([[0.3333, 1.0000, 0.5000]])
        """
        order = scores.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        return torch.empty_like(scores).scatter(-1, order, self._of_places(place).expand_as(order))

    def _of_places(self, place: Tensor) -> Tensor:
        return (self.k / (place + 1)).clamp(max=1) ** self.exponent
