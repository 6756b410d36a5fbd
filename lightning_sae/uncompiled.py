"""Methods that `torch.compile` leaves as they are."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(method: Callable[P, T]) -> Callable[P, T]:
    """Have `torch.compile` call a method as it is, where it compiles what is around it.

    How many matches a batch has, and how many tiles are searched for them, is in the data: dynamo
    breaks such code into dozens of graphs, compiles each anew for other numbers, and takes minutes
    to. What it could make faster is a product of matrices that takes as long either way.

    Args:
        method: Of a module; its calls are the same otherwise.
    """
    disabled: Callable[P, T] = torch.compiler.disable(method)
    return disabled
