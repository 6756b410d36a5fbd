"""What is asked of a state before it is loaded: that training could have led to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError
from lightning_sae.parallel import local

__all__ = ["refuse_unfit", "require_finite", "taken_from", "told_in_one_line"]


def refuse_unfit(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state that a module, or a part of it, does not take, while nothing is loaded.

    Whether tensors are missing, or have another shape, is for torch to say.

    Args:
        module: What the state is for.
        state_dict: The state, perhaps among that of a parent.
        prefix: How the names of the module's own begin there.

    Raises:
        UsageError: If counters are no whole numbers, or `check_state` refuses.
    """
    for path, part in module.named_modules():
        check_state = getattr(part, "check_state", None)
        if check_state is None:
            continue
        here = f"{prefix}{path}." if path else prefix
        state = {}
        for name, own in part.state_dict().items():
            found = state_dict.get(here + name)
            if isinstance(found, Tensor) and isinstance(own, Tensor):
                if found.is_floating_point() != own.is_floating_point():
                    raise UsageError(f"{name} is to be loaded as {found.dtype}, and is {own.dtype}")
                state[name] = found
        check_state(state)


def require_finite(
    state: Mapping[str, Tensor], *names: str, least: float = -math.inf, beyond: float = -math.inf
) -> None:
    """Refuse a state in which tensors are out of range.

    Args:
        state: Tensors by their names.
        names: Which of them; one that is not there is not looked at.
        least: No value may be smaller.
        beyond: All values must be larger.

    Raises:
        UsageError: If a value is NaN or infinite, or out of range.
    """
    for name in names:
        tensor = local(state[name]) if name in state else torch.empty(0)
        if tensor.numel() == 0:
            continue
        smallest, largest = (each.item() for each in tensor.aminmax())  # makes no copy
        if not math.isfinite(smallest) or not math.isfinite(largest):
            raise UsageError(f"{name} has NaN or Inf in the state to load")
        if smallest < least or smallest <= beyond:
            bound = f"at least {least:g}" if smallest < least else f"more than {beyond:g}"
            raise UsageError(f"{name}={smallest:g} in the state to load must be {bound}")


def taken_from(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], who: str
) -> dict[str, Tensor]:
    """Return of a state dict the tensors that are to take the place of one's own.

    Args:
        state_dict: That of something else, which may have more.
        own: One's own, by name.
        who: What messages say the state dict is not.

    Raises:
        UsageError: If one is missing, or has another shape.
    """
    for name, tensor in own.items():
        found = state_dict.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "none" if found is None else tuple(found.shape)
            raise UsageError(f"{who}: {name} should have shape {tuple(tensor.shape)}, not {shape}")
    return {name: state_dict[name] for name in own}


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn what torch says of a state that does not fit into a UsageError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UsageError(" ".join(str(error).split())) from error
