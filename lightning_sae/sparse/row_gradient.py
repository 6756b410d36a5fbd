"""The gradient of a matrix with one row a feature, without the memory that it would take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sae.matches import Matches
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

    @classmethod
    def sum(cls, parts: "list[RowGradient]") -> "RowGradient":
        """Return the sum of gradients of the same matrix, made orthogonal to the same rows."""
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
        return cls(table, token, weight, starts, parts[0].along)

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


class GradientCollector:
    """Has all terms of a loss make one gradient of a matrix, not one each.

    A term by itself makes one as large as the matrix, however few its matches.

    Args:
        read: Makes of a parameter the rows that terms are computed from.
    """

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self._read = read
        self._collected: dict[Tensor, tuple[Tensor, list[RowGradient]]] = {}

    def collect(self, parameter: Tensor) -> tuple[Tensor, list[RowGradient]]:
        """Return the rows of a parameter, and where to leave parts of their gradient."""
        if parameter not in self._collected:
            parts: list[RowGradient] = []
            rows = _Collected.apply(self._read(parameter), parts, gradient_parts(parameter))  # type: ignore[no-untyped-call]  # torch does not annotate it
            self._collected[parameter] = rows, parts
        return self._collected[parameter]

    def forget_before(self, loss: Tensor) -> Tensor:
        """Return the loss of which each backward pass then begins without parts of an earlier one.

        Every pass that meets any of the terms must come from there.
        """
        if loss.requires_grad:
            parts = [parts for _, parts in self._collected.values()]

            def forget(grad: Tensor) -> None:
                # A pass that did not reach the parameter has left its parts behind.
                for each in parts:
                    each.clear()

            loss.register_hook(forget)
        return loss


class _Collected(torch.autograd.Function):
    """The identity, whose backward pass comes after those of all that was made of its result."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, parts: list[RowGradient], kept: list[RowGradient] | None
    ) -> Tensor:
        ctx.parts, ctx.kept = parts, kept
        ctx.set_materialize_grads(False)  # there is none if all of it is in parts
        return matrix.view_as(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        parts = ctx.parts.copy()
        ctx.parts.clear()
        if ctx.kept is not None:
            ctx.kept.extend(parts)
        elif parts:
            gradient = RowGradient.sum(parts).dense()
            grad = gradient if grad is None else gradient.add_(grad)
        return grad, None, None


def leave_or_give(gradient: RowGradient, parts: list[RowGradient] | None) -> Tensor | None:
    """Leave a gradient with other parts of the same, or, where there is no list, give it whole."""
    if parts is None:
        return gradient.dense()
    parts.append(gradient)
    return None
