"""A search as on a GPU, of scores that are a tensor."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.matches import Pairs
from lightning_sae.selection import Scores, Search, TensorScores

BLOCK = 8


class TensorSearch(Search):
    """What kernels do, of all scores at once."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__((scores.shape[0], scores.shape[1]), scores.device)
        self.scores = scores

    def block_maxima(
        self, rows: slice, thresholds: Tensor | None = None, *, rows_are_tokens: bool
    ) -> tuple[Tensor, Tensor]:
        some = self.scores[rows] if rows_are_tokens else self.scores.T[rows]
        padded = functional.pad(some, (0, -some.shape[1] % BLOCK), value=-torch.inf)
        counts = torch.zeros(len(some), dtype=torch.int32)
        if thresholds is not None:
            counts += (some > thresholds[rows, None].clamp_min(0)).sum(1)
        return padded.unflatten(1, (-1, BLOCK)).amax(2), counts

    def pairs_above(self, thresholds: Tensor, most: int | None = None) -> Pairs | None:
        feature, token = (~(self.scores <= thresholds)).T.nonzero(as_tuple=True)
        if most is not None and len(token) > most:
            return None
        return token, feature, self.scores[token, feature]

    def some_pairs_above(self, thresholds: Tensor, capacity: int) -> tuple[Tensor, Pairs]:
        pairs = self.pairs_above(thresholds)
        last = (self.shape[0] - 1, self.shape[1] - 1, 0.0)
        fitting = [
            functional.pad(column[:capacity], (0, max(0, capacity - len(column))), value=filler)
            for column, filler in zip(pairs, last, strict=True)
        ]
        return torch.tensor(len(pairs[0])), tuple(fitting)


def both(scores: Tensor) -> tuple[Scores, Scores]:
    """Scores that are searched, and the same without a search."""
    searched = TensorScores(scores)
    searched.search = TensorSearch(scores)
    return searched, TensorScores(scores)
