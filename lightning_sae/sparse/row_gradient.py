"""The gradient of a matrix with one row a feature, without the memory that it would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # private in name: torch's docs on subclasses use it

from lightning_sae.parallel.share import distributed_like, local
from lightning_sae.sparse.row_sums import RowSums, rows_at_a_time

__all__ = ["GradientForm", "RowGradient", "gradient_of"]

aten = torch.ops.aten


@dataclass
class _Content:
    """What a gradient and its aliases share: parts to be added up, or the tensor they made."""

    parts: list[RowSums]
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
            if content.parts:
                content.whole = RowSums.merged(content.parts).dense().to(self.dtype)
            else:
                content.whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            content.parts = []
        return content.whole

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows of a gradient in parts, a few at a time, and which features they are."""
        features, width = self.shape
        step = rows_at_a_time(self.device)
        for start in range(0, features, step):
            rows = slice(start, min(start + step, features))
            sums = [part.rows(rows) for part in self.content.parts]
            total = sums[0] if sums else torch.zeros(rows.stop - start, width, device=self.device)
            for other in sums[1:]:
                total += other
            yield rows, total.to(self.dtype)

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


def gradient_of(sums: RowSums, *, in_parts: bool) -> Tensor:
    """Return a gradient, whole unless it may be in parts and these are smaller than all of it."""
    features, tokens = len(sums.starts) - 1, len(sums.table)
    return RowGradient.of(sums) if in_parts and tokens < features else sums.dense()


class GradientForm:
    """A hook on a parameter, by which its gradient comes as a plain tensor or is left in parts.

    It is called with what all terms of a loss have added up to, before that is accumulated.

    Attributes:
        in_parts: Whether to leave it in parts, where it comes so.
    """

    def __init__(self) -> None:
        self.in_parts = False

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return a gradient in the form that is wanted, features shared out as they were."""
        own = local(gradient)
        if self.in_parts or not isinstance(own, RowGradient):
            return gradient
        return distributed_like(gradient, own.form())


def _formed(value: Any) -> Any:
    return value.form() if isinstance(value, RowGradient) else value


def _are_parts(*values: Any) -> bool:
    return all(isinstance(value, RowGradient) and value.in_parts for value in values)


def _with_parts(gradient: RowGradient, parts: list[RowSums]) -> RowGradient:
    return RowGradient(_Content(parts), gradient.shape, gradient.dtype, gradient.device)


def _alias(gradient: RowGradient) -> RowGradient:
    return RowGradient(gradient.content, gradient.shape, gradient.dtype, gradient.device)


def _view(gradient: RowGradient, size: Sequence[int]) -> Any:
    return _alias(gradient) if list(size) == list(gradient.shape) else NotImplemented


def _clone(gradient: RowGradient, **_: Any) -> Any:
    parts = gradient.content.parts
    return _with_parts(gradient, parts.copy()) if _are_parts(gradient) else NotImplemented


def _to_copy(gradient: RowGradient, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if not _are_parts(gradient) or (device is not None and device != gradient.device):
        return NotImplemented
    # Parts stay in their own dtype until they are added up.
    content = _Content(gradient.content.parts.copy())
    return RowGradient(content, gradient.shape, dtype or gradient.dtype, gradient.device)


def _add(one: Any, other: Any, *, alpha: float = 1) -> Any:
    if not _are_parts(one, other) or alpha != 1:
        return NotImplemented
    return _with_parts(one, one.content.parts + other.content.parts)


def _add_(one: Any, other: Any, *, alpha: float = 1) -> Any:
    if not _are_parts(one, other) or alpha != 1:
        return NotImplemented
    one.content.parts += other.content.parts
    return one


def _scaled(parts: list[RowSums], factor: Tensor | float) -> list[RowSums]:
    return [replace(part, weight=(part.weight * factor).to(part.weight)) for part in parts]


def _mul(one: Any, other: Any) -> Any:
    if not _are_parts(one) or (isinstance(other, Tensor) and other.dim() > 0):
        return NotImplemented
    return _with_parts(one, _scaled(one.content.parts, other))


def _mul_(one: Any, other: Any) -> Any:
    if not _are_parts(one) or (isinstance(other, Tensor) and other.dim() > 0):
        return NotImplemented
    one.content.parts = _scaled(one.content.parts, other)
    return one


def _zero_(gradient: RowGradient) -> RowGradient:
    gradient.content.parts, gradient.content.whole = [], None
    return gradient


def _norm(gradient: Any, ord: Any = 2, *others: Any, **options: Any) -> Any:  # noqa: A002
    if not _are_parts(gradient) or ord != 2 or others or options.get("dtype") is not None:
        return NotImplemented
    squares = [rows.square().sum() for _, rows in gradient.chunks()]
    return torch.stack(squares).sum().sqrt()


def _on_each(operation: Any) -> Callable[..., list[Tensor]]:
    """Return what a foreach operation does, one tensor after another; each finds its own way."""
    return lambda tensors, *args: [operation(tensor, *args) for tensor in tensors]


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
    aten._foreach_norm.Scalar: _on_each(torch.linalg.vector_norm),
    aten._foreach_mul_.Tensor: _on_each_in_place(Tensor.mul_),
    aten._foreach_zero_.default: _on_each_in_place(Tensor.zero_),
}
"""What operations do to gradients in parts; NotImplemented where they need the whole."""
