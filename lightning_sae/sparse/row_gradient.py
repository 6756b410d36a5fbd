"""The gradient of a matrix with one row a feature, without the memory that it would take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.allocation import Matches
from lightning_sae.sparse.rows import sum_segments

_PARTS = "gradient_parts"  # attribute of a parameter
_ROWS = 1024  # few enough to stay in a CPU's cache
_ROWS_ON_GPU = 1 << 16  # 200 MB at a width of 768: enough to keep it busy


@dataclass
class RowGradient:
    """A gradient as the rows to be added up for each feature: one for each of its matches.

    Attributes:
        table: Rows that are added up, shape (tokens, width).
        token: Row of the table of each match, by feature, int64, shape (matches,).
        weight: What it is multiplied by, shape (matches,).
        starts: At which match each feature starts, and their number, int64, (features + 1,).
        along: If given, a matrix to whose rows those of the gradient are made orthogonal, shape
            (features, width).
    """

    table: Tensor
    token: Tensor
    weight: Tensor
    starts: Tensor
    along: Tensor | None

    @classmethod
    def of(
        cls, table: Tensor, weight: Tensor, matches: Matches, along: Tensor | None = None
    ) -> "RowGradient":
        """Return the gradient to which each match adds its token's row of a table.

        Args:
            table: Shape (tokens, width).
            weight: What rows are multiplied by, in the order of the matches, shape (matches,).
            matches: Sorted by token.
            along: See above.
        """
        token, feature, order = matches.by_feature
        features = torch.arange(matches.shape[1] + 1, device=feature.device)
        return cls(table, token, weight[order], torch.searchsorted(feature, features), along)

    def dense(self) -> Tensor:
        """Return the whole of it, shape (features, width)."""
        gradient = sum_segments(self.table, self.token, self.weight, self.starts)
        step = rows_at_a_time(gradient)
        for start, rows in zip(range(0, len(gradient), step), gradient.split(step), strict=True):
            self._project(rows, start)
        return gradient

    def rows(self, start: int, end: int) -> Tensor:
        """Return the rows of some features, shape (end - start, width)."""
        first, last = self.starts[start].item(), self.starts[end].item()
        matches = slice(first, last)
        starts = self.starts[start : end + 1] - first
        rows = sum_segments(self.table, self.token[matches], self.weight[matches], starts)
        self._project(rows, start)
        return rows

    def _project(self, rows: Tensor, start: int) -> None:
        if self.along is None:
            return
        along = self.along[start : start + len(rows)]
        squared = torch.linalg.vecdot(along, along).clamp_min(1e-24)
        radial = torch.linalg.vecdot(rows, along) / squared
        rows.addcmul_(along, radial.unsqueeze(1), value=-1)


def rows_at_a_time(matrix: Tensor) -> int:
    """Return of how many rows of a matrix to make a chunk."""
    return _ROWS_ON_GPU if matrix.is_cuda else _ROWS


def gradient_parts(parameter: Tensor) -> list[RowGradient] | None:
    """Return where the gradient of a parameter is left in parts, if its optimizer wants that."""
    return getattr(parameter, _PARTS, None)


def keep_in_parts(parameter: Tensor) -> None:
    """Have the gradient of a parameter left in parts, instead of as its `grad`."""
    setattr(parameter, _PARTS, [])


def give_whole(parameter: Tensor) -> None:
    """Have the gradient of a parameter given as its `grad` again."""
    if gradient_parts(parameter) is not None:
        delattr(parameter, _PARTS)


def leave_or_give(gradient: RowGradient, parts: list[RowGradient] | None) -> Tensor | None:
    """Leave a gradient with other parts of the same, or, where there is no list, give it whole."""
    if parts is None:
        return gradient.dense()
    parts.append(gradient)
    return None
