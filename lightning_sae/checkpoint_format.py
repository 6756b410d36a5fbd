"""The format of checkpoints: its number, and how those of earlier formats become it.

Format 1 had no number. Its dictionary was `W_dec` and `b_dec`, its counters stood beside them, and
some arguments had other names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, MutableMapping
from typing import Any, Final

from lightning_sae.checks import UsageError

__all__ = ["FORMAT", "KEY", "format_of", "is_sae", "upgrade", "upgrade_state_dict"]

FORMAT: Final = 2
KEY: Final = "lightning_sae_format"
"""Where a checkpoint has its number."""

TENSORS: Final = {
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
    "tokens_seen": "history.tokens_seen",
    "tokens_since_fired": "history.tokens_since_fired",
    "density": "history.density",
}
COMMON: Final = ("encoder.weight", "encoder.bias", "input_mean", "input_scale", "initialized")
"""What has had these names in every format, and together in no module of anyone else's."""

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
    if format_of(checkpoint) == FORMAT:
        return
    upgrade_state_dict(checkpoint.get("state_dict", {}))
    if "architecture" in checkpoint:  # else the module is someone else's, and so are its arguments
        _upgrade_arguments(checkpoint.get("hyper_parameters", {}), checkpoint["architecture"])
        checkpoint[KEY] = FORMAT
    if any(name in checkpoint for name in DATA_MODULES):
        arguments = checkpoint.get("datamodule_hyper_parameters", {})
        _rename(arguments, DATA_ARGUMENTS)
        _drop(arguments, LIGHTNING_CLI)


def format_of(checkpoint: dict[str, Any]) -> int:
    """Return the number of a checkpoint's format.

    Raises:
        UsageError: If it is a later one than this version knows.
    """
    found = checkpoint.get(KEY, 1)
    if not (isinstance(found, int) and 1 <= found <= FORMAT):
        raise UsageError(
            f"the checkpoint has {KEY}={found!r}, and this version of lightning_sae reads up to "
            f"{FORMAT}: use the version that wrote it, or a later one"
        )
    return found


def upgrade_state_dict(state_dict: MutableMapping[str, Any]) -> None:
    """Give the tensors of every SAE in a state dict their present names, in place."""
    for key in [key for key in state_dict if key.endswith("W_dec")]:
        prefix = key.removesuffix("W_dec")
        if all(f"{prefix}{name}" in state_dict for name in (*COMMON, *TENSORS)):
            _rename(state_dict, {prefix + old: prefix + new for old, new in TENSORS.items()})


def is_sae(state_dict: Collection[str]) -> bool:
    """Return whether a state dict, of any format, is that of an SAE: not of its parent."""
    return all(name in state_dict for name in COMMON)


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


def _rename(mapping: MutableMapping[str, Any], names: dict[str, str]) -> None:
    """Rename keys, which keep their place."""
    if any(name in mapping for name in names):
        renamed = {names.get(key, key): value for key, value in mapping.items()}
        mapping.clear()
        mapping.update(renamed)


def _drop(mapping: MutableMapping[str, Any], names: Collection[str]) -> None:
    for name in names:
        mapping.pop(name, None)
