"""The SAE that a callback works on: the module that is trained, or a part of it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_sae.checks import UsageError

__all__ = ["find_sae"]


def find_sae(module: nn.Module, *needed: str, of: object) -> Any:
    """Return the module that has what a callback needs, itself or the one part of it that does.

    Args:
        module: What is trained.
        needed: Names of attributes.
        of: The callback.

    Returns:
        None if there is none, of which a warning says what was missed.

    Raises:
        UsageError: If several parts have it: which of them the data are of, nobody knows.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and all(hasattr(part, attribute) for attribute in needed):
            found[name] = part
    who, where = type(of).__name__, type(module).__name__
    if len(found) > 1:
        raise UsageError(f"{who} is for one SAE, and {where} has several: {', '.join(found)}")
    if not found:
        names = " and ".join(needed)
        rank_zero_warn(f"{who} does nothing: neither {where} nor a part of it has {names}")
    return next(iter(found.values()), None)
