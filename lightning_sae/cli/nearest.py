"""What a name may be meant for that does not exist: a key, a class, a configuration."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, Final

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from lightning_sae.data import StreamDataModule
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.several_saes import SeveralSAEs

__all__ = ["meant", "meant_file", "with_nearest_class", "with_nearest_key", "with_nearest_value"]

BASES: Final[tuple[type, ...]] = (
    *(SparseAutoencoder, SeveralSAEs, StreamDataModule, Callback, Logger, Strategy),
    *(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
)
"""Classes whose subclasses are named in configurations."""


def meant(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a name that is not known; empty if no other is near."""
    nearest = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f", did you mean '{nearest[0]}'?" if nearest else ""


def meant_file(name: str, known: Iterable[str]) -> str:
    """Return the same about a file, which may be known by a part of its name: `gpt2`, say.

    Args:
        name: As the user wrote it, with or without folder and ending.
        known: Paths of the files that there are.
    """
    files = sorted(set(known))
    stem = PurePath(name).stem
    parts = [file for file in files if len(stem) > 1 and stem in PurePath(file).stem]
    if parts:
        return f", did you mean {' or '.join(map(repr, parts))}?"
    stems = {PurePath(file).stem: file for file in files}
    nearest = difflib.get_close_matches(stem, stems, n=1)
    return f", did you mean '{stems[nearest[0]]}'?" if nearest else ""


def with_nearest_key(message: str, parsers: Iterable[Any]) -> str:
    """Return a message about a key that parsers have not, with the nearest one that they have.

    Args:
        message: Any.
        parsers: Those of jsonargparse that know keys.
    """
    key = re.search(r"option '(.+)'|unrecognized arguments: --([^\s=]+)", message, re.IGNORECASE)
    if key is None or "did you mean" in message:
        return message
    known = (each.get_defaults(skip_validation=True).keys() for each in parsers)
    return message + meant(key[1] or key[2], itertools.chain(*known))


def with_nearest_class(message: str) -> str:
    """Return a message about a class that there is not, with the nearest one that there is."""
    wrong = re.search(r"Expected a dot import path string: (\w+)(: Given value: .*)?$", message)
    wrong = wrong or re.search(r"(?:Problem.*)?module '[\w.]+' has no attribute '(\w+)'$", message)
    if wrong is None:
        return message
    known = {each.__name__ for base in BASES for each in _subclasses(base)}
    public = {name for name in known if not name.startswith("_")}
    return f"{message[: wrong.start()]}there is no class {wrong[1]}{meant(wrong[1], public)}"


def with_nearest_value(message: str) -> str:
    """Return a message about a value that is none of a few, with the nearest one that is."""
    few = re.findall(r"typing\.Literal\[([^\]]*)\]", message)
    told = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    wrong = re.search(r"(?:Got|Given) value: (\S+)$", told)
    if not few or wrong is None:
        return told
    return told + meant(wrong[1], re.findall(r"'([^']*)'", ", ".join(few)))


def _subclasses(base: type) -> set[type]:
    found: set[type] = {base}
    below: list[type] = type.__subclasses__(base)
    for each in below:
        found |= _subclasses(each)
    return found
