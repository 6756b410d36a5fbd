"""What an optimizer takes from a checkpoint: only what it could have made of its parameters.

torch compares the number of parameters and nothing else, and a fused optimizer trusts the shapes:
with moments that are too small it would read and write beyond their end.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sae.checks import UsageError
from lightning_sae.core.loading import require_finite
from lightning_sae.parallel import local

__all__ = ["is_of_torch", "require_state_of"]


def require_state_of(
    optimizer: Optimizer, state_dict: Mapping[str, Any], names: Mapping[Tensor, str], *, begun: bool
) -> None:
    """Refuse a state that is not of such an optimizer, or not of such parameters.

    Args:
        optimizer: That it is to be loaded into.
        state_dict: The state.
        names: What the parameters are called.
        begun: Whether the optimizer that it is of has made a step.

    Raises:
        UsageError: If a state is missing, is one too many, has another shape than that of its
            parameter asks for, or is not finite. Of an optimizer that is not torch's, only states
            that are there are looked at.
    """
    kind = f"optimizer={type(optimizer).__name__}"
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != found:
        raise UsageError(f"{kind} has groups of {sizes} parameters, and in the checkpoint {found}")
    states = dict(state_dict["state"])
    begun = begun or bool(states)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            _require(
                states.pop(key, {}),
                parameter,
                made=_made_by(optimizer, group, parameter),
                told=f"{kind}: of {names.get(parameter, 'a parameter')}",
                exactly=begun and parameter.requires_grad and is_of_torch(optimizer),
            )
    if states:
        extra = min(map(str, states))
        raise UsageError(f"{kind} has no parameter for state {extra} of the checkpoint's")


def _require(
    found: Mapping[str, Any],
    parameter: Tensor,
    made: Mapping[str, tuple[Any, torch.Size]],
    told: str,
    exactly: bool,
) -> None:
    """Refuse a state of one parameter if it is not what would be made of it."""
    if exactly and found.keys() != made.keys():
        both = (" and ".join(sorted(each)) or "nothing" for each in (made, found))
        raise UsageError("{} it keeps {}, and the checkpoint has {}".format(told, *both))
    for key in found.keys() & made.keys():
        value, (like, shape) = found[key], made[key]
        if not isinstance(like, Tensor):
            continue
        if not isinstance(value, Tensor) or value.shape != shape:
            has = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise UsageError(f"{told} the checkpoint has {key} of shape {has}, not {tuple(shape)}")
        if shape == parameter.shape and local(value).shape != local(parameter).shape:
            raise UsageError(f"{told} the checkpoint's {key} is shared out in another way")
        if value.is_floating_point():
            name = f"{key}{told.partition(':')[2]}"
            counts = shape == () and parameter.dim() > 0  # steps, or products of decays
            least = 0.0 if counts else -math.inf
            require_finite({name: value.detach()}, name, least=least)


def _made_by(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor
) -> dict[str, tuple[Any, torch.Size]]:
    """Return the states that the optimizer keeps of a parameter, and the shapes they have.

    If it has none yet a copy makes a step with a small parameter, whose sizes are all different, so
    that those of its states tell which sizes of the parameter they follow.

    Returns:
        A state like it, and the shape, by name; nothing if a copy cannot make a step.
    """
    own = optimizer.state.get(parameter, {})
    if own or not parameter.requires_grad:
        return {key: (value, getattr(value, "shape", torch.Size())) for key, value in own.items()}
    sizes = torch.Size(range(2, 2 + parameter.dim()))
    small = nn.Parameter(torch.zeros(sizes, dtype=parameter.dtype, device=parameter.device))
    small.grad = torch.zeros_like(small)
    probe = copy.copy(optimizer)  # of which torch copies these and the defaults
    probe.state, probe.param_groups = defaultdict(dict), [group | {"params": [small]}]
    try:
        probe.step(lambda: 0.0)
    except Exception:  # it is someone else's, and leans on more than torch copies
        return {}
    large = dict(zip(sizes, parameter.shape, strict=True))
    return {
        key: (value, torch.Size(large.get(size, size) for size in getattr(value, "shape", ())))
        for key, value in probe.state[small].items()
    }


def is_of_torch(optimizer: Optimizer) -> bool:
    """Return whether it makes the states of one of torch's own, all with its first step."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    kinds = (kind for kind in type(optimizer).__mro__ if kind is not Optimizer)
    return any(kind.__module__.startswith("torch.optim.") for kind in kinds)
