"""The gradient of a matrix with one row a feature, without the memory that it would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # private in name: torch's docs on subclasses use it

from lightning_sae.sparse.row_sums import RowSums, rows_at_a_time

__all__ = ["RowGradient"]

aten = torch.ops.aten


@dataclass
class _Content:
    """What a gradient and its aliases share: parts to be added up, or the tensor they made.

    Attributes:
        parts: Sums for the same features.
        plain: What has been added to them that never was in parts.
        whole: All of it together, once it is formed.
    """

    parts: list[RowSums]
    plain: Tensor | None = None
    whole: Tensor | None = None


class RowGradient(Tensor):
    """A gradient (features, width) that is kept as the parts it is the sum of.

    Autograd and `Parameter.grad` take it as they take any tensor. Adding two up, multiplying by a
    number, and the norm that gradients are clipped by need no more than the parts, and `chunks`
    yields it a few rows at a time; every other operation forms the whole of it first, once. So all
    terms of a loss make one gradient of a matrix, and an optimizer that steps chunk by chunk
    (`lightning_sae.ChunkedAdam`) never holds one as large as the weights.

    Make one with `RowGradient.of`.
    """

    content: _Content

    @staticmethod
    def __new__(
        cls: type[RowGradient],
        content: _Content,
        size: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> RowGradient:
        """Return a gradient with this content; `of` is what others call."""
        # What torch's docs make such subclasses with; it has no public name.
        gradient: RowGradient = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        gradient.content = content
        return gradient

    @classmethod
    def of(cls, part: RowSums) -> RowGradient:
        """Return the gradient that consists of one part, in the dtype of its table."""
        table = part.table
        size = torch.Size((len(part.starts) - 1, table.shape[1]))
        return cls(_Content([part]), size, table.dtype, table.device)

    @property
    def in_parts(self) -> bool:
        """Whether the whole of it has not been formed."""
        return self.content.whole is None

    def form(self) -> Tensor:
        """Return the whole of it, shape (features, width), which it is from then on."""
        content = self.content
        if content.whole is None:
            total = None
            for parts in self._by_direction():
                sums = RowSums.merged(parts).dense()
                total = sums if total is None else total.add_(sums)
            if total is None:
                total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            total = total.to(self.dtype)
            content.whole = total if content.plain is None else total.add_(content.plain)
            content.parts, content.plain = [], None
        return content.whole

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows of a gradient in parts, a few at a time, and which features they are."""
        for part in self.content.parts:
            part.require_same_weights()  # which may change chunk by chunk from now on
        features, width = self.shape
        step = rows_at_a_time(self.device)
        for start in range(0, features, step):
            rows = slice(start, min(start + step, features))
            sums = [part.rows(rows) for part in self.content.parts]
            total = sums[0] if sums else torch.zeros(rows.stop - start, width, device=self.device)
            for other in sums[1:]:
                total += other
            if self.content.plain is not None:
                total += self.content.plain[rows]
            yield rows, total.to(self.dtype)

    def _by_direction(self) -> list[list[RowSums]]:
        """Return parts in lists that are made orthogonal to the same rows."""
        groups: dict[Any, list[RowSums]] = {}
        for part in self.content.parts:
            part.require_same_weights()
            along = part.along
            key = None if along is None else (along.data_ptr(), along.dtype)
            groups.setdefault(key, []).append(part)
        return list(groups.values())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Leave results as they are: Tensor's own would make a RowGradient of each."""
        with torch._C.DisableTorchFunctionSubclass():  # documented under this name
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what `_ON_PARTS` knows to do on parts, and all else on the whole."""
        kwargs = kwargs or {}
        if func in _ON_PARTS:
            result = _ON_PARTS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*tree_map(_formed, args), **tree_map(_formed, kwargs))
        in_place = func._schema.is_mutable and isinstance(args[0], cls)
        return args[0] if in_place else result


def _formed(value: Any) -> Any:
    return value.form() if isinstance(value, RowGradient) else value


def _are_parts(*values: Any) -> bool:
    return all(isinstance(value, RowGradient) and value.in_parts for value in values)


def _with_content(gradient: RowGradient, content: _Content) -> RowGradient:
    return RowGradient(content, gradient.shape, gradient.dtype, gradient.device)


def _alias(gradient: RowGradient) -> RowGradient:
    return _with_content(gradient, gradient.content)


def _view(gradient: RowGradient, size: Sequence[int]) -> Any:
    return _alias(gradient) if list(size) == list(gradient.shape) else NotImplemented


def _clone(gradient: RowGradient, **_: Any) -> Any:
    return _with_content(gradient, _times(gradient, 1)) if _are_parts(gradient) else NotImplemented


def _to_copy(gradient: RowGradient, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if not _are_parts(gradient) or (device is not None and device != gradient.device):
        return NotImplemented
    # Parts stay in their own dtype until they are added up.
    content, dtype = _times(gradient, 1), dtype or gradient.dtype
    return RowGradient(content, gradient.shape, dtype, gradient.device)


def _add(one: Any, other: Any, *, alpha: float = 1) -> Any:
    """Add two gradients, at least one of them in parts."""
    first = one if _are_parts(one) else other
    if not _are_parts(first) or alpha != 1 or not _alike(one, other):
        return NotImplemented
    total = _with_content(first, _times(first, 1))
    second = other if first is one else one
    return total if _take_in(total.content, second) else NotImplemented


def _add_(one: Any, other: Any, *, alpha: float = 1) -> Any:
    """Add a gradient to one in parts."""
    if not _are_parts(one) or alpha != 1 or not _alike(one, other):
        return NotImplemented
    return one if _take_in(one.content, other) else NotImplemented


def _alike(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.dtype == other.dtype


def _take_in(content: _Content, other: Any) -> bool:
    """Add another gradient to a content, and return whether that was worth while."""
    if not _are_parts(other):
        plain = _formed(other)
        content.plain = plain.clone() if content.plain is None else content.plain + plain
        return True
    # A loss has up to four terms; more parts are those of an accumulation, and may become more
    # than the gradient itself.
    features = len(other)
    if sum(len(part.table) for part in content.parts + other.content.parts) > 4 * features:
        return False
    content.parts = content.parts + other.content.parts
    if other.content.plain is not None:
        _take_in(content, other.content.plain)
    return True


def _times(gradient: RowGradient, factor: Tensor | float) -> _Content:
    """Return the content of a gradient in parts, times a number."""
    content = gradient.content
    if isinstance(factor, int) and factor == 1:
        return _Content(content.parts.copy(), content.plain)
    parts = [replace(part, weight=(part.weight * factor).to(part.weight)) for part in content.parts]
    return _Content(parts, None if content.plain is None else content.plain * factor)


def _mul(one: Any, other: Any) -> Any:
    if not _are_parts(one) or (isinstance(other, Tensor) and other.dim() > 0):
        return NotImplemented
    return _with_content(one, _times(one, other))


def _mul_(one: Any, other: Any) -> Any:
    if not _are_parts(one) or (isinstance(other, Tensor) and other.dim() > 0):
        return NotImplemented
    content = _times(one, other)
    one.content.parts, one.content.plain = content.parts, content.plain
    return one


def _zero_(gradient: RowGradient) -> RowGradient:
    content = gradient.content
    content.parts, content.plain, content.whole = [], None, None
    return gradient


def _norm(gradient: Any, ord: Any = 2, *others: Any, **options: Any) -> Any:  # noqa: A002
    if not _are_parts(gradient) or ord != 2 or others or options.get("dtype") is not None:
        return NotImplemented
    squares = [rows.square().sum() for _, rows in gradient.chunks()]
    return torch.stack(squares).sum().sqrt()


def _plain_norm(tensor: Tensor, ord: Any = 2, dtype: Any = None) -> Tensor:  # noqa: A002
    norm: Tensor = torch.linalg.vector_norm(tensor, ord, dtype=dtype)
    return norm


def _on_each(operation: Any) -> Callable[..., list[Tensor]]:
    """Return what a foreach operation does, one tensor after another; each finds its own way."""
    return lambda tensors, *args, **kwargs: [operation(each, *args, **kwargs) for each in tensors]


def _on_each_in_place(operation: Any) -> Callable[..., None]:
    def on_each(tensors: list[Tensor], *args: Any) -> None:
        for tensor in tensors:
            operation(tensor, *args)

    return on_each


_ON_PARTS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.view.default: _view,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.mul.Tensor: _mul,
    aten.mul_.Tensor: _mul_,
    aten.zero_.default: _zero_,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _on_each(_plain_norm),
    aten._foreach_mul_.Tensor: _on_each_in_place(Tensor.mul_),
    aten._foreach_zero_.default: _on_each_in_place(Tensor.zero_),
}
"""What operations do to gradients in parts; NotImplemented where they need the whole."""
