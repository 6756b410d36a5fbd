"""The SAEs that a callback works on: the module that is trained, or parts of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_sae.checks import UsageError
from lightning_sae.part import ALONE, part_of

__all__ = ["find_sae", "find_saes", "trained_together"]


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
    found = find_saes(module, *needed, of=of)
    if len(found) > 1:
        _refuse(of, module, [part_of(each).name for each in found])
    return next(iter(found), None)


def find_saes(module: nn.Module, *needed: str, of: object) -> list[Any]:
    """Return what `find_sae` does, and of several that are trained together all.

    Args:
        module: What is trained.
        needed: Names of attributes.
        of: The callback.

    Returns:
        Nothing if there is none, of which a warning says what was missed.

    Raises:
        UsageError: If several parts have it, and do not say what of the data they are of.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and all(hasattr(part, attribute) for attribute in needed):
            found[name] = part
    if len(found) > 1 and any(part_of(each) is ALONE for each in found.values()):
        _refuse(of, module, found)
    if not found:
        who, where, names = type(of).__name__, type(module).__name__, " and ".join(needed)
        rank_zero_warn(f"{who} does nothing: neither {where} nor a part of it has {names}")
    return [*found.values()]


def trained_together(module: nn.Module) -> list[nn.Module]:
    """Return the SAEs that a module trains beside each other; itself if it is something else."""
    return [each for each in module.children() if part_of(each) is not ALONE] or [module]


def _refuse(callback: object, module: nn.Module, names: Iterable[str]) -> None:
    who, where = type(callback).__name__, type(module).__name__
    raise UsageError(f"{who} is for one SAE, and {where} has several: {', '.join(names)}")
