"""Rows of a table, added up for each feature: what a gradient of a matrix consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.matches import Matches
from lightning_sae.sparse.rows import sum_segments

__all__ = ["RowSums", "rows_at_a_time"]

_ROWS = 1024  # few enough to stay in a CPU's cache
_ROWS_ON_GPU = 1 << 16  # 200 MB at a width of 768: enough to keep it busy


@dataclass(frozen=True)
class RowSums:
    """For each feature, the rows to be added up: one for each of its matches.

    Attributes:
        table: Rows that are added up, shape (tokens, width).
        token: Row of the table of each match, by feature, int64, shape (matches,).
        weight: What it is multiplied by, shape (matches,).
        starts: At which match each feature starts, and their number, int64, (features + 1,).
        along: If given, a matrix to whose rows those of the sum are made orthogonal, shape
            (features, width), of any floating-point type. It must not change before the rows are
            added up.
        version: How often that had changed when this was made.
    """

    table: Tensor
    token: Tensor
    weight: Tensor
    starts: Tensor
    along: Tensor | None
    version: int

    @classmethod
    def of(
        cls, table: Tensor, weight: Tensor, matches: Matches, along: Tensor | None = None
    ) -> RowSums:
        """Return the sums to which each match adds its token's row of a table.

        Args:
            table: Shape (tokens, width).
            weight: What rows are multiplied by, in the order of the matches, shape (matches,).
            matches: Sorted by token.
            along: See above.
        """
        token, feature, order = matches.by_feature
        features = torch.arange(matches.shape[1] + 1, device=feature.device)
        starts = torch.searchsorted(feature, features)
        version = 0 if along is None else along._version  # as autograd itself would check it
        return cls(table, token, weight[order], starts, along, version)

    def require_same_weights(self) -> None:
        """Raise if what the rows are made orthogonal to has changed.

        Raises:
            RuntimeError: If it has: a gradient is that of the weights it was computed with.
        """
        if self.along is not None and self.along._version != self.version:
            raise RuntimeError(
                "the weights have changed since this gradient was left in parts: look at it before "
                "the optimizer steps, and clear it (zero_grad) before the next backward pass"
            )

    @classmethod
    def merged(cls, parts: Sequence[RowSums]) -> RowSums:
        """Return the sum of sums for the same features, made orthogonal to the same rows."""
        if len(parts) == 1:
            return parts[0]
        starts = torch.stack([part.starts for part in parts]).sum(0)
        tokens, places = [], []
        first_token, first_place = 0, starts[:-1]
        for part in parts:
            # Of each feature the matches of this part come after those of the parts before.
            shift = first_place - part.starts[:-1]
            each, count = part.starts.diff(), len(part.token)
            place = torch.arange(count, device=starts.device)
            places.append(place + shift.repeat_interleave(each, output_size=count))
            tokens.append(part.token + first_token)
            first_token, first_place = first_token + len(part.table), first_place + each
        place, weights = torch.cat(places), [part.weight for part in parts]
        token, weight = (
            torch.empty_like(entries).index_copy_(0, place, entries)
            for entries in (torch.cat(tokens), torch.cat(weights))
        )
        table = torch.cat([part.table for part in parts])
        return cls(table, token, weight, starts, parts[0].along, parts[0].version)

    def dense(self) -> Tensor:
        """Return the sums of all features, shape (features, width)."""
        sums = sum_segments(self.table, self.token, self.weight, self.starts)
        step = rows_at_a_time(sums.device)
        for start, rows in zip(range(0, len(sums), step), sums.split(step), strict=True):
            self._project(rows, start)
        return sums

    def rows(self, features: slice) -> Tensor:
        """Return the sums of some features, shape (some, width)."""
        first, last = self.starts[features.start].item(), self.starts[features.stop].item()
        matches = slice(first, last)
        starts = self.starts[features.start : features.stop + 1] - first
        rows = sum_segments(self.table, self.token[matches], self.weight[matches], starts)
        self._project(rows, features.start)
        return rows

    def _project(self, rows: Tensor, start: int) -> None:
        if self.along is None:
            return
        along = self.along[start : start + len(rows)].to(rows.dtype)
        squared = torch.linalg.vecdot(along, along).clamp_min(1e-24)
        radial = torch.linalg.vecdot(rows, along) / squared
        rows.addcmul_(along, radial.unsqueeze(1), value=-1)


def rows_at_a_time(device: torch.device) -> int:
    """Return of how many rows of a matrix to make a chunk."""
    return _ROWS_ON_GPU if device.type == "cuda" else _ROWS
