"""Which of two implementations serves a call: torch's, or the Triton kernel of the same name."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # kernels accumulate in float32

P = ParamSpec("P")
R = TypeVar("R")


def with_kernel(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Let a function's twin in `lightning_sae.sparse.kernels` serve the calls that it can.

    These are calls whose first tensor lies on a GPU and has one of `DTYPES`, if Triton is
    installed, as it is with torch's CUDA builds. All others go to the function itself.
    """

    @functools.wraps(function)
    def dispatch(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if first.is_cuda and first.dtype in DTYPES and _has_triton():
            kernels = importlib.import_module("lightning_sae.sparse.kernels")
            with torch.cuda.device(first.device):  # Triton launches on the current one
                return getattr(kernels, function.__name__)(first, *args, **kwargs)  # type: ignore[no-any-return]  # looked up by name
        return function(first, *args, **kwargs)

    return dispatch


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
