"""Scores of all pairs of a batch, a tile at a time: they need never be in memory at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_sae.allocation.matches import Found, Matches
from lightning_sae.allocation.search import Search
from lightning_sae.allocation.tile import Tile, strictly
from lightning_sae.sharding import Share

_PAIRS = 6 << 20  # in a tile: 24 MiB of float32; TopK is slower with smaller ones
_PAIRS_ON_GPU = 1 << 26  # 256 MiB: fewer, larger products


class Scores(ABC):
    """What a choice ranks pairs by: as a matrix (tokens, features), of which it reads tiles.

    Where features are shared out over processes, each has tiles of its own features; what is found
    in them has to be collected.

    Attributes:
        shape: (tokens, features).
        share: Which of the features have their tiles here.
        thresholds: If set, one a feature: then `passing` is counted whenever all tiles of features
            are read.
        passing: How many tokens score above each feature's threshold, int64, (features,).
        search: A faster way than tiles, where there is one, and all features are here.
    """

    def __init__(self, tokens: int, share: Share) -> None:
        self.shape = (tokens, share.features)
        self.share = share
        self.search: Search | None = None
        self.thresholds: Tensor | None = None
        self.passing: Tensor

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tiles are computed."""

    @abstractmethod
    def of_features(self, features: slice, room: Tensor | None = None) -> Tensor:
        """Return the scores of some features, float32 or wider, contiguous, (features, tokens).

        Args:
            features: Numbered from the first that has its tiles here.
            room: Scores of as many, returned before, that may be overwritten.
        """

    @abstractmethod
    def of_tokens(self, tokens: slice, room: Tensor | None = None) -> Tensor:
        """Return the scores of some tokens, float32 or wider, contiguous, (tokens, features).

        Args:
            tokens: Which.
            room: Scores of as many, returned before, that may be overwritten.
        """

    def dense(self) -> Tensor:
        """Return all scores at once, shape (tokens, features)."""
        return self.of_tokens(slice(0, self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0]

    def above(self, thresholds: Tensor) -> Matches:
        """Return all pairs that are positive and above the threshold of their feature.

        Args:
            thresholds: Shape (features,), or 0-d for one that holds for all.

        Returns:
            Pairs with their scores as values, sorted by token, then by feature.

        Raises:
            FloatingPointError: If any score is NaN or infinite.
        """
        thresholds = thresholds.to(self.device).expand(self.shape[1])
        if self.search is not None:
            return self.search.above(thresholds).sort()
        found = Found(self.shape, len(self), self.device)  # a feature a token, or more
        for start, tile in self.feature_tiles():
            bounds = strictly(thresholds[start : start + len(tile.rows)].to(tile.rows.dtype))
            feature, token, score = tile.above(bounds)
            found.add(token, feature + start, score)
        return self.collect(found.pairs()).sort()

    def collect(self, found: Matches) -> Matches:
        """Return what all processes found among their features, each sorted by feature.

        Returns:
            Sorted by feature too: the same on all processes.
        """
        if self.share.mesh is None:
            return found
        # In float64, numbers and scores are exact and travel together.
        columns = (found.token, found.feature, found.value)
        pairs = self.share.everyones(torch.stack([each.double() for each in columns], 1))
        token, feature, value = pairs.unbind(1)
        return Matches(token.long(), feature.long(), value.to(found.value), self.shape)

    def collect_by_token(self, found: Matches) -> Matches:
        """Return the same of pairs sorted by token, whose features are numbered from 0 here."""
        if self.share.mesh is None:
            return found
        found.feature = found.feature + self.share.here.start
        pairs = self.collect(found)
        return pairs.select(pairs.token.argsort(stable=True))

    def feature_tiles(self) -> Iterator[tuple[int, Tile]]:
        """Yield tiles whose rows are features, each with the number of its first feature.

        A tile is gone when the next one is asked for.

        Raises:
            FloatingPointError: After the last one, if any score is NaN or infinite.
        """
        here = self.share.here
        # Made first: small tensors made between tiles would take the places of freed large ones.
        passing = torch.zeros(here.stop - here.start, dtype=torch.int64, device=self.device)
        for place, tile in self._tiles(len(passing), self.shape[0], self.of_features):
            end = place + len(tile.rows)
            if self.thresholds is not None:
                thresholds = self.thresholds[here.start + place : here.start + end]
                passing[place:end] = tile.count_above(thresholds)
            yield here.start + place, tile
        if self.thresholds is not None:
            self.passing = self.share.everyones(passing)

    def token_tiles(self) -> Iterator[tuple[int, Tile]]:
        """Yield tiles whose rows are tokens, each with the number of its first token.

        Their columns are the features whose tiles are here. A tile is gone when the next one is
        asked for.

        Raises:
            FloatingPointError: After the last one, if any score is NaN or infinite.
        """
        columns = self.share.here.stop - self.share.here.start
        yield from self._tiles(self.shape[0], columns, self.of_tokens)

    def _tiles(
        self, rows: int, columns: int, compute: Callable[[slice, Tensor | None], Tensor]
    ) -> Iterator[tuple[int, Tile]]:
        pairs = _PAIRS if self.device.type == "cpu" else _PAIRS_ON_GPU
        step = max(1, pairs // max(1, columns))
        total = torch.zeros((), device=self.device)
        room = None  # the first tile's, which is the largest
        for start in range(0, rows, step):
            end = min(start + step, rows)
            scores = compute(slice(start, end), None if room is None else room[: end - start])
            room = scores if room is None else room
            tile = Tile(scores)
            yield start, tile
            total = total + tile.maxima.sum()  # NaN or infinite if one of them is
        if not bool(self.share.sum(total).isfinite()):  # else a NaN would just never be chosen
            raise FloatingPointError("scores are not finite")


class TensorScores(Scores):
    """Scores that are in memory as one tensor (tokens, features) of any floating-point type."""

    def __init__(self, scores: Tensor) -> None:
        if scores.dim() != 2:
            raise ValueError(f"affinities must be (tokens, features), not {tuple(scores.shape)}")
        super().__init__(len(scores), Share((scores.shape[1],)))
        # Detached and widened: 16-bit scores would tie so often that a choice became arbitrary.
        self._scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self._scores.device

    def of_features(self, features: slice, room: Tensor | None = None) -> Tensor:
        """Return a transposed copy of some columns."""
        return self._scores[:, features].T.contiguous()

    def of_tokens(self, tokens: slice, room: Tensor | None = None) -> Tensor:
        """Return some rows."""
        return self._scores[tokens].contiguous()
