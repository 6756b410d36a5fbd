"""The largest scores of rows, where scores are quicker computed twice than written down once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from lightning_sae.host_copy import look
from lightning_sae.matches import Matches, Pairs
from lightning_sae.numerics import just_below
from lightning_sae.selection.ranking import among_largest, kth_largest

_NOTHING = torch.tensor(torch.finfo(torch.float32).tiny).nextafter(torch.zeros(())).item()
"""What a score must be above to count as positive: below it arithmetic may round to zero."""

_CROWDED = 3 / 4  # of as many entries as blocks: then too many others are above the bound
_ROOM = 2  # for how many times as many as are wanted: what maxima of blocks let through
_PAIRS = 1 << 31  # whose maxima are in memory at a time: 256 MiB, of blocks of 32


class Search(ABC):
    """Finds large scores in passes over all pairs, none of which keeps more than it finds.

    A first pass leaves the largest score of each block of a row. Since each of these is a score of
    the row, the k-th largest of them is a lower bound of its k-th largest score. A second pass
    finds all scores that are not below their bounds. Both must compute a score to the same bits.

    Args:
        shape: (tokens, features).
        device: Where scores are computed.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device

    @abstractmethod
    def block_maxima(
        self, rows: slice, thresholds: Tensor | None = None, *, rows_are_tokens: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the maxima of blocks of some rows, and how many tokens are above thresholds.

        Args:
            rows: Tokens, or features.
            thresholds: If given, one a feature, float32, shape (features,).
            rows_are_tokens: Whether rows are tokens, else features.

        Returns:
            Shape (rows, blocks), and of each feature the count, shape (rows,), if rows are features
            and thresholds are given.
        """

    @abstractmethod
    def pairs_above(self, thresholds: Tensor, most: int | None = None) -> Pairs | None:
        """Return all pairs that score above a threshold, sorted by feature, then by token.

        Args:
            thresholds: Float32, one a feature, shape (features,), or one a token, (tokens, 1).
            most: If given, nothing is returned if more are found, and more than a buffer holds.
        """

    @abstractmethod
    def some_pairs_above(self, thresholds: Tensor, capacity: int) -> tuple[Tensor, Pairs]:
        """Return how many pairs score above a threshold, 0-d, and those that fit, (capacity,) each.

        Args:
            thresholds: As for `pairs_above`.
            capacity: How many fit. Places that are left over are filled up with the last pair of
                all, by feature and by token, and a score of zero.
        """

    def above(self, thresholds: Tensor) -> Matches:
        """Return all pairs that are positive and above a threshold.

        Args:
            thresholds: One a feature, shape (features,), one a token, shape (tokens, 1), or one for
                all, shape (1,). Nothing is above NaN.

        Returns:
            Pairs sorted by feature, then by token.

        Raises:
            FloatingPointError: If any score is NaN, or infinite and above its threshold.
        """
        return cast(Matches, self._above(thresholds))  # no number of pairs is too many

    def at_least(self, bounds: Tensor) -> Matches:
        """Return as `above` all pairs that are positive and at least their bound."""
        return self.above(just_below(bounds))

    def some_above(self, thresholds: Tensor, room: int) -> tuple[Matches, Tensor]:
        """Return pairs as `above` does, if there is room for all: nobody waits for their number.

        Args:
            thresholds: As for `above`.
            room: For how many pairs, at least 1.

        Returns:
            As many pairs as there is room for, or as there are at all, sorted by feature, then by
            token, of which those with a value of zero fill up places that are left over; and
            whether none was left out and all are finite, bool, 0-d.
        """
        capacity = min(room, self.shape[0] * self.shape[1])
        count, found = self.some_pairs_above(self._bounds(thresholds), capacity)
        pairs = Matches(*found, self.shape)
        return pairs, (count <= capacity) & pairs.value.isfinite().all()

    def _bounds(self, thresholds: Tensor) -> Tensor:
        if thresholds.dim() == 1:
            thresholds = thresholds.expand(self.shape[1])
        thresholds = thresholds.float().masked_fill(thresholds.isnan(), torch.inf)
        return thresholds.clamp_min(_NOTHING)

    def _above(self, thresholds: Tensor, most: int | None = None) -> Matches | None:
        found = self.pairs_above(self._bounds(thresholds), most)
        if found is None:
            return None
        token, feature, score = found
        if not bool(score.isfinite().all()):
            raise FloatingPointError("scores are not finite")
        return Matches(token, feature, score, self.shape)

    def candidates_of_batch(
        self, budget: int, guess: Tensor | float | None = None
    ) -> Matches | None:
        """Return pairs that hold the `budget` largest of all; None if tiles find them sooner.

        Args:
            budget: How many pairs are wanted.
            guess: If given, what is at least this is returned, budget or not, unless it is far more
                than the budget.
        """
        if guess is not None:
            bound = torch.as_tensor(guess, device=self.device).reshape(1)
            found = self._above(just_below(bound), most=2 * budget)
            if found is not None:
                return found
        largest, blocks = [], 0
        for rows in self._parts(rows_are_tokens=False):
            maxima = self.block_maxima(rows, rows_are_tokens=False)[0].flatten()
            largest.append(maxima.topk(min(budget, len(maxima))).values)
            blocks += len(maxima)
        if not 0 < budget <= blocks * _CROWDED:
            return None
        bound = torch.cat(largest).topk(budget).values[-1:]
        return self.at_least(bound)

    def largest_of_each_token(self, count: int) -> Matches | None:
        """Return the `count` largest of each token; None if tiles find them sooner."""
        bounds = [torch.empty(0, 1, device=self.device)]
        for rows in self._parts(rows_are_tokens=True):
            maxima, _ = self.block_maxima(rows, rows_are_tokens=True)
            if count > maxima.shape[1] * _CROWDED:
                return None
            bounds.append(maxima.topk(count, dim=1).values[:, -1:])
        tokens, bound = self.shape[0], just_below(torch.cat(bounds))
        counts = torch.full((tokens,), count, dtype=torch.int64, device=self.device)
        found, sound = self.some_above(bound, max(1, _ROOM * count * tokens))
        chosen = among_largest(found.token, found.value, counts) & (found.value > 0)
        number, is_sound = look(chosen.sum(), sound)
        if is_sound:
            return found.select(chosen, number).sort()
        found = self.above(bound)
        return found.select(among_largest(found.token, found.value, counts)).sort()

    def largest_of_each_feature(
        self, counts: Tensor, thresholds: Tensor | None = None
    ) -> tuple[Matches, Tensor | None] | None:
        """Return the largest of each feature, and how many tokens are above its threshold.

        Args:
            counts: How many of each feature, int64, shape (features,).
            thresholds: As for `block_maxima`.

        Returns:
            Pairs, and numbers of tokens, int64, shape (features,), if thresholds are given; None if
            tiles find them sooner.
        """
        bounds, passing = [], []
        for rows in self._parts(rows_are_tokens=False):
            maxima, passed = self.block_maxima(rows, thresholds, rows_are_tokens=False)
            blocks, wanted = maxima.shape[1], counts[rows]
            if int((wanted > blocks * _CROWDED).sum()) > len(wanted) / 64:
                return None
            # Where more are wanted than there are blocks, whatever is positive will do.
            bound = kth_largest(maxima, wanted.clamp(max=blocks)).masked_fill(wanted > blocks, 0)
            bounds.append(bound)
            passing.append(passed)
        found = self.at_least(torch.cat(bounds))
        chosen = among_largest(found.feature, found.value, counts)
        counted = None if thresholds is None else torch.cat(passing).long()
        return found.select(chosen).sort(), counted

    def _parts(self, *, rows_are_tokens: bool) -> Iterator[slice]:
        rows, columns = self.shape if rows_are_tokens else self.shape[::-1]
        step = max(1, _PAIRS // max(1, columns))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
