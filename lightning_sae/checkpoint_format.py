"""The format of checkpoints: its number, and how those of earlier formats become it.

Tensors are named as in `lightning_sae.core.state_format`. In format 1, which had no number, some
arguments had other names too. Format 2 had no choice of `normalize_inputs`, and
format 3 no `rank_discount`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any, Final

from lightning_sae.checks import UsageError
from lightning_sae.core.state_format import FORMAT, is_sae, rename, require_known, upgrade_names

__all__ = [
    "FORMAT",
    "KEY",
    "PARTS",
    "TRAINED_WITH",
    "format_of",
    "is_sae",
    "require_one",
    "upgrade",
]

KEY: Final = "lightning_sae_format"
"""Where a checkpoint has its number."""
TRAINED_WITH: Final = "trained_with"
"""Where it has the arguments on which the code of a token depends, whatever it is loaded with."""
PARTS: Final = "parts"
"""Where a checkpoint of several SAEs has the notes of each, by its name."""

DATA_ARGUMENTS: Final = {"lm_batch_size": "model_batch_size", "lm_dtype": "model_dtype"}
DATA_MODULES: Final = ("ActivationDataModule", "ImageActivationDataModule")
"""Whose state a checkpoint has under the name of the class."""

LIGHTNING_CLI: Final = ("_instantiator", "_class_path")
"""How checkpoints of the command line named code to make the module with; nothing reads it."""


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint of any format into the present one, in place.

    Works on SAEs that are children of another module, and leaves everything else alone: also a
    checkpoint without any SAE.

    Raises:
        UsageError: If the checkpoint is of a later format than this version knows.
    """
    number = format_of(checkpoint)
    if number == 1:
        _upgrade_first(checkpoint)
    if number < FORMAT and "architecture" in checkpoint:
        checkpoint[KEY] = FORMAT
        arguments = checkpoint.setdefault("hyper_parameters", {})
        for settings in (arguments, checkpoint.setdefault(TRAINED_WITH, dict(arguments))):
            settings.setdefault("normalize_inputs", "average")
            if "threshold" in checkpoint.get("state_dict", {}):
                settings.setdefault("rank_discount", 0.0)


def format_of(checkpoint: dict[str, Any]) -> int:
    """Return the number of a checkpoint's format.

    Raises:
        UsageError: If it is a later one than this version knows.
    """
    return require_known(checkpoint.get(KEY, 1))


def require_one(checkpoint: Mapping[str, Any], where: object) -> None:
    """Refuse a checkpoint of several SAEs where one is asked for.

    Args:
        checkpoint: What is in it.
        where: What messages call it.

    Raises:
        UsageError: If it is one; the message says where each SAE is.
    """
    if PARTS in checkpoint:
        names = ", ".join(checkpoint[PARTS])
        raise UsageError(
            f"{where} holds several SAEs: name the folder of one, {names}, in `pretrained` in the "
            "folder of its run"
        )


def _upgrade_first(checkpoint: dict[str, Any]) -> None:
    upgrade_names(checkpoint.get("state_dict", {}))
    if "architecture" in checkpoint:  # else the module is someone else's, and so are its arguments
        _upgrade_arguments(checkpoint.get("hyper_parameters", {}), checkpoint["architecture"])
    if any(name in checkpoint for name in DATA_MODULES):
        arguments = checkpoint.get("datamodule_hyper_parameters", {})
        rename(arguments, DATA_ARGUMENTS)
        _drop(arguments, LIGHTNING_CLI)


def _upgrade_arguments(arguments: dict[str, Any], architecture: str) -> None:
    _drop(arguments, LIGHTNING_CLI)
    if architecture == "StandardSAE":  # which never took it
        _drop(arguments, ("importance",))
    if "mutual_choice_for" in arguments:  # had two units
        given = arguments.pop("mutual_choice_for")
        if given > 1:
            arguments["mutual_choice_tokens"] = math.ceil(given)
        else:
            arguments["mutual_choice_share"] = given


def _drop(mapping: MutableMapping[str, Any], names: Collection[str]) -> None:
    for name in names:
        mapping.pop(name, None)
