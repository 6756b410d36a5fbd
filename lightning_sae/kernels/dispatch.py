"""Which of two implementations serves a call: torch's, or the Triton kernel of the same name."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_sae.matches import Pairs

_FILES = {
    "block_maxima": "maxima",
    "dot_rows": "dots",
    "pairs_above": "pairs",
    "some_pairs_above": "pairs",
    "sum_rows": "sums",
    "sum_segments": "sums",
}
"""Which file a kernel is in. They are imported at the first call that a GPU serves, never with the
package: Triton is optional."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # kernels accumulate in float32

P = ParamSpec("P")
R = TypeVar("R")


def with_kernel(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Let a function's twin in `lightning_sae.kernels` serve the calls that it can.

    These are calls whose first tensor lies on a GPU and has one of `DTYPES`, if Triton is
    installed, as it is with torch's CUDA builds. All others go to the function itself.
    """

    @functools.wraps(function)
    def dispatch(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if has_kernel(first):
            return _kernel(function.__name__, first, *args, **kwargs)  # type: ignore[no-any-return]  # looked up by name
        return function(first, *args, **kwargs)

    return dispatch


def has_kernel(tensor: Tensor) -> bool:
    """Return whether a kernel can serve calls with this tensor."""
    return tensor.is_cuda and tensor.dtype in DTYPES and _has_triton()


def pairs_above(x: Tensor, *args: Any) -> Pairs | None:
    """Call the kernel of this name; only where `has_kernel`. Others go by tiles of scores."""
    return _kernel("pairs_above", x, *args)  # type: ignore[no-any-return]  # looked up by name


def some_pairs_above(x: Tensor, *args: Any) -> tuple[Tensor, Pairs]:
    """Call the kernel of this name; only where `has_kernel`. Others go by tiles of scores."""
    return _kernel("some_pairs_above", x, *args)  # type: ignore[no-any-return]  # looked up by name


def block_maxima(x: Tensor, *args: Any, rows_are_tokens: bool) -> tuple[Tensor, Tensor]:
    """Call the kernel of this name; only where `has_kernel`. Others go by tiles of scores."""
    return _kernel("block_maxima", x, *args, rows_are_tokens=rows_are_tokens)  # type: ignore[no-any-return]  # looked up by name


def _kernel(name: str, first: Tensor, *args: Any, **kwargs: Any) -> Any:
    file = importlib.import_module(f"lightning_sae.kernels.{_FILES[name]}")  # needs Triton
    with torch.cuda.device(first.device):  # Triton launches on the current one
        return getattr(file, name)(first, *args, **kwargs)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
