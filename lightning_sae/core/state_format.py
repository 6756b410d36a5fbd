"""How the tensors of an SAE are named, and how those of earlier formats come to be named so.

Format 1 had no number. Its dictionary was `W_dec` and `b_dec`, and its counters stood beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any, Final

from torch import nn

from lightning_sae.checks import UsageError

__all__ = ["FORMAT", "is_sae", "rename", "require_known", "upgrade_names", "upgrade_state"]

FORMAT: Final = 4

TENSORS: Final = {
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
    "tokens_seen": "history.tokens_seen",
    "tokens_since_fired": "history.tokens_since_fired",
    "density": "history.density",
}
COMMON: Final = ("encoder.weight", "encoder.bias", "input_mean", "input_scale", "initialized")
"""What has had these names in every format, and together in no module of anyone else's."""


def require_known(number: Any) -> int:
    """Return the number of a format.

    Raises:
        UsageError: If it is a later one than this version knows.
    """
    if not (isinstance(number, int) and 1 <= number <= FORMAT):
        raise UsageError(
            f"the checkpoint has lightning_sae_format={number!r}, and this version of "
            f"lightning_sae reads up to {FORMAT}: use the version that wrote it, or a later one"
        )
    return number


def is_sae(state_dict: Collection[str]) -> bool:
    """Return whether a state dict, of any format, is that of an SAE: not of its parent."""
    return all(name in state_dict for name in COMMON)


def upgrade_names(state_dict: MutableMapping[str, Any]) -> None:
    """Give the tensors of every SAE in a state dict their present names, in place."""
    for key in [key for key in state_dict if key.endswith("W_dec")]:
        prefix = key.removesuffix("W_dec")
        if all(f"{prefix}{name}" in state_dict for name in (*COMMON, *TENSORS)):
            rename(state_dict, {prefix + old: prefix + new for old, new in TENSORS.items()})


def rename(mapping: MutableMapping[str, Any], names: Mapping[str, str]) -> None:
    """Rename keys, which keep their place."""
    if any(name in mapping for name in names):
        renamed = {names.get(key, key): value for key, value in mapping.items()}
        mapping.clear()
        mapping.update(renamed)


def upgrade_state(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Bring a state up to date that is to be loaded: torch calls it, as one of its hooks.

    Raises:
        UsageError: If it is of a later format than this version knows, or of one in which all
            tokens had one scale, or matches no discount, and the module has other settings.
    """
    # A state dict without the note is an older one, or was made by something else than torch.
    number = require_known(metadata.get("version", 1))
    if number == 2 and getattr(module, "normalize_inputs", "average") != "average":
        raise UsageError(
            "normalize_inputs='token': the state to load was trained with 'average', and perhaps "
            "with importance='token_norm', the defaults of its time: give both"
        )
    if number in (2, 3) and getattr(module, "discount", None) is not None:
        raise UsageError(
            "the state to load was trained without a discount for ranks: give rank_discount=0"
        )
    upgrade_names(state_dict)
