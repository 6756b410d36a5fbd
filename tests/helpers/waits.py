"""Where a training step would wait for a GPU, counted on a CPU that stands in for one."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_sae
from lightning_sae import host_copy
from lightning_sae.host_copy import HostCopy
from lightning_sae.kernels import dispatch, dots, maxima, pairs, sums
from lightning_sae.sparse import encode

PACKAGE = Path(lightning_sae.__file__).parent
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
SHAPES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"tolist", "numpy", "cpu"}


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, by the line of the package they come from.

    These are numbers that are read, results whose shape is in the data, and constants that are
    copied to the device. What stands in for kernels is left out, and so is a `HostCopy` that was
    sent before: not in this block of `with`, but in an earlier one.

    Attributes:
        found: How many there were, by place, operation and file.
    """

    now: Waits | None = None  # the step under way

    def __init__(self) -> None:
        super().__init__()
        self.arrived: dict[int, Tensor] = {}  # copies on the host, by address
        self.found: Counter[str] = Counter()
        self._functions = _Functions(self)

    def __enter__(self) -> Waits:
        Waits.now = self
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        Waits.now = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        masks = name in INDEXING and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
            for each in tree_leaves(args[1])
        )
        if name in READS and self.is_here(args[0]):
            return func(*args, **(kwargs or {}))
        if name in READS | SHAPES | {"lift_fresh"} or sized or masks:
            self.count(name)
        return func(*args, **(kwargs or {}))

    def is_here(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the host already."""
        return tensor.untyped_storage().data_ptr() in self.arrived

    def count(self, name: str) -> None:
        """Count an operation at the place where the package asks for it."""
        places = [
            f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.name}"
            for frame in traceback.extract_stack()
            if frame.filename.startswith(f"{PACKAGE}/")
        ]
        self.found[f"{places[-1] if places else 'elsewhere'} {name}"] += 1


class _Functions(TorchFunctionMode):
    """Counts what copies to the host: from a CPU to itself, no operation would show it."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_cpu = name == "to" and "cpu" in [each for each in args[1:2] if isinstance(each, str)]
        to_cpu = to_cpu and not (kwargs or {}).get("non_blocking")
        if to_cpu or (name in COPIES and not self._waits.is_here(args[0])):
            self._waits.count(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_kernels(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Go the way of a GPU: all but the kernels themselves, for which dense products stand in."""
    with patch.context() as patched:
        for module in (dispatch, encode):
            patched.setattr(module, "has_kernel", lambda tensor: tensor.dtype in dispatch.DTYPES)
        patched.setattr(host_copy, "_is_host", lambda tensor: False)
        patched.setattr(HostCopy, "send", _send)
        patched.setattr(HostCopy, "read", _read)
        patched.setattr(torch.cuda, "device", contextlib.nullcontext)
        patched.setattr(pairs, "launch", _unseen(_launch))
        patched.setattr(maxima, "launch", _unseen(_launch))
        patched.setattr(sums, "_launch", _unseen(_sum_rows))
        patched.setattr(dots, "_dot_rows", {(i,): _unseen(_dot_rows) for i in range(10_000)})
        yield


_send_really, _read_really = HostCopy.send, HostCopy.read


def _send(copy: Any, *args: Any) -> None:
    _send_really(copy, *args)
    copy.sent_in = Waits.now


def _read(copy: Any, *args: Any) -> Tensor:
    found = _read_really(copy, *args)
    if Waits.now is not None:
        if getattr(copy, "sent_in", None) is Waits.now:
            Waits.now.count("arrival")
        Waits.now.arrived[found.untyped_storage().data_ptr()] = found
    return found


def _unseen(kernel: Any) -> Any:
    """Leave out what a kernel consists of: on a GPU it is launched."""

    def unseen(*args: Any) -> None:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
            kernel(*args)

    return unseen


def _launch(kernel: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Any, *args: Any) -> None:
    scores = x.float() @ weight.float().T + bias.float()
    scores = scores if scale is None else scores * scale[:, None]
    if kernel is pairs._pairs_above:
        thresholds, _, count, token, feature, score, capacity = args
        found = (~(scores <= thresholds)).nonzero().T
        count.fill_(found.shape[1])
        found = found[:, :capacity]
        token[: found.shape[1]], feature[: found.shape[1]] = found
        score[: found.shape[1]] = scores[tuple(found)]
        return
    thresholds, found, counts, _, block, rows_are_tokens = args
    rows = scores if rows_are_tokens else scores.T
    padded = torch.full((len(rows), found.shape[1] * block), -torch.inf)
    padded[:, : rows.shape[1]] = rows
    found.copy_(padded.unflatten(1, (-1, block)).amax(2))
    if thresholds is not None:
        counts.copy_((scores > thresholds).sum(0))


def _sum_rows(
    table: Tensor, row: Tensor, weight: Tensor, first: Tensor, last: Tensor, out: Tensor, *more: Any
) -> None:
    for segment, (start, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        total = weight[start:stop].float() @ table[row[start:stop]].float()
        if more:
            others, first_other, last_other = more
            total = total + others[first_other[segment] : last_other[segment]].sum(0)
        out[segment] = total


def _dot_rows(
    left: Tensor, left_row: Tensor, right: Tensor, right_row: Tensor, out: Tensor, *_: Any
) -> None:
    out.copy_((left[left_row].float() * right[right_row].float()).sum(1))
