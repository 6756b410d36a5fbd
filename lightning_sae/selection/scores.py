"""Scores of all pairs of a batch, a tile at a time: they need never be in memory at once."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.numerics import wide
from lightning_sae.parallel.share import Share
from lightning_sae.selection.search import Search
from lightning_sae.selection.tile import BLOCK, Tile

_PAIRS = 6 << 20  # in a tile: 24 MiB of float32
_PAIRS_ON_GPU = 1 << 26  # 256 MiB: fewer, larger products
_TOKENS = 1024  # in a tile of tokens, if there are as many: with fewer, products are slower

_Span = tuple[slice, slice]  # rows and columns of a tile


class Scores(ABC):
    """What a choice ranks pairs by: as a matrix (tokens, features), of which it reads tiles.

    Where features are shared out over processes, each has tiles of its own features; what is found
    in them has to be collected.

    Args:
        tokens: How many there are.
        share: Which of the features have their tiles here.
        device: Where tiles are computed.

    Attributes:
        shape: (tokens, features), features of all processes together.
        share, device: As given.
        search: A faster way than tiles, where there is one, and all features are here.
    """

    def __init__(self, tokens: int, share: Share, device: torch.device) -> None:
        self.shape = (tokens, share.features)
        self.share = share
        self.device = device
        self.search: Search | None = None

    @abstractmethod
    def feature_rows(self, features: slice, out: Tensor | None = None) -> Tensor:
        """Return the scores of some features, float32 or wider, contiguous, (features, tokens).

        Args:
            features: Numbered from the first that has its tiles here.
            out: Scores of as many, returned before, that may be overwritten.
        """

    @abstractmethod
    def token_rows(self, tokens: slice, features: slice, out: Tensor | None = None) -> Tensor:
        """Return the scores of some pairs, float32 or wider, contiguous, (tokens, features).

        Args:
            tokens: Which.
            features: Numbered from the first that has its tiles here.
            out: Scores of as many, returned before, that may be overwritten.
        """

    def dense(self) -> Tensor:
        """Return the scores of all pairs at once, shape (tokens, features).

        Those of all features, also where they are shared out: then every process has to call this.
        """
        own = self.token_rows(slice(0, len(self)), slice(0, self._features_here))
        return self.share.everyones(own.T).T.contiguous()

    def __len__(self) -> int:
        return self.shape[0]

    def collect(self, pairs: Matches) -> Matches:
        """Return what all processes found among their features, the same on all of them.

        Returns:
            One after another: sorted by feature if each found them so.
        """
        if self.share.mesh is None:
            return pairs
        # In float64, numbers and scores are exact and travel together.
        columns = (pairs.token, pairs.feature, pairs.value)
        everyones = self.share.everyones(torch.stack([each.double() for each in columns], 1))
        token, feature, value = everyones.unbind(1)
        return Matches(token.long(), feature.long(), value.to(pairs.value), self.shape)

    def feature_tiles(self) -> Iterator[tuple[slice, Tile]]:
        """Yield tiles whose rows are features, with the numbers of these features.

        A tile is gone when the next one is asked for.

        Raises:
            FloatingPointError: After the last one, if any score is NaN or infinite.
        """
        first, tokens = self.share.here.start, len(self)
        step = max(1, self._pairs // max(1, tokens))
        spans = [(rows, slice(0, tokens)) for rows in _cut(self._features_here, step)]
        for (rows, _), tile in self._tiles(
            spans, lambda span, out: self.feature_rows(span[0], out)
        ):
            yield slice(first + rows.start, first + rows.stop), tile

    def token_tiles(self) -> Iterator[tuple[slice, int, Tile]]:
        """Yield tiles whose rows are tokens, with which tokens and the number of the first feature.

        All features of some tokens come one after another. A tile is gone when the next one is
        asked for.

        Raises:
            FloatingPointError: After the last one, if any score is NaN or infinite.
        """
        tokens, features = len(self), self._features_here
        high = max(1, min(_TOKENS, tokens), self._pairs // max(1, features))
        wide = -(-max(1, self._pairs // high) // BLOCK) * BLOCK
        spans = [(rows, some) for rows in _cut(tokens, high) for some in _cut(features, wide)]
        for (rows, some), tile in self._tiles(spans, lambda span, out: self.token_rows(*span, out)):
            yield rows, self.share.here.start + some.start, tile

    def _tiles(
        self, spans: list[_Span], compute: Callable[[_Span, Tensor | None], Tensor]
    ) -> Iterator[tuple[_Span, Tile]]:
        total = torch.zeros((), device=self.device)
        buffer = None  # the first tile's, which is the largest
        for span in spans:
            shape = [each.stop - each.start for each in span]
            out = None if buffer is None else buffer[: math.prod(shape)].view(shape)
            scores = compute(span, out)
            buffer = scores.view(-1) if buffer is None else buffer
            tile = Tile(scores)
            yield span, tile
            total = total + tile.maxima.sum()  # NaN or infinite if one of them is
        if not bool(self.share.sum(total).isfinite()):  # else a NaN would just never be chosen
            raise FloatingPointError("scores are not finite")

    @property
    def _features_here(self) -> int:
        """How many features have their tiles here."""
        return int(self.share.here.stop - self.share.here.start)

    @property
    def _pairs(self) -> int:
        return _PAIRS if self.device.type == "cpu" else _PAIRS_ON_GPU


def _cut(length: int, step: int) -> list[slice]:
    """Return at least one slice: processes must agree on a dtype, also one that has no scores."""
    starts = range(0, max(1, length), step)
    return [slice(start, min(start + step, length)) for start in starts]


class TensorScores(Scores):
    """Scores that are in memory as one tensor.

    Args:
        scores: Shape (tokens, features), of any floating-point type.

    Raises:
        ValueError: If it is not two-dimensional.
    """

    def __init__(self, scores: Tensor) -> None:
        if scores.dim() != 2:
            raise UsageError(f"affinities must be (tokens, features), not {tuple(scores.shape)}")
        super().__init__(len(scores), Share((scores.shape[1],)), scores.device)
        # Detached and widened: 16-bit scores would tie so often that a choice became arbitrary.
        self._scores = wide(scores.detach())

    def feature_rows(self, features: slice, out: Tensor | None = None) -> Tensor:
        """Return a transposed copy of some columns."""
        return self._scores[:, features].T.contiguous()

    def token_rows(self, tokens: slice, features: slice, out: Tensor | None = None) -> Tensor:
        """Return some rows and columns."""
        return self._scores[tokens, features].contiguous()
