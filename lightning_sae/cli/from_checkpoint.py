"""What a checkpoint was trained with, in place of what a packaged configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.checkpoint_format import TRAINED_WITH
from lightning_sae.checkpoint_io import open_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.cli.parser import find_config

__all__ = ["with_its_settings"]


def with_its_settings(tokens: Sequence[str], config: Any) -> list[str]:
    """Return a command line that measures a checkpoint with what it was trained with.

    Its number of features, k and importance, and the model, layer and dtype it read come after the
    last packaged configuration, which they overrule, and before what else the user says, by which
    they are overruled: then the checkpoint is refused. An earlier version's notes none of it.

    Args:
        tokens: The command line.
        config: What it was parsed to, of its subcommand.
    """
    place = _after_packaged(tokens)
    if place == 0 or not config.get("ckpt_path"):
        return list(tokens)
    try:
        found = open_checkpoint(config.ckpt_path)
    except (UsageError, OSError):  # which is told when the run begins
        return list(tokens)
    settings = []
    if _class_of(config.model) == found.get("architecture") and TRAINED_WITH in found:
        arguments = {"n_features": found.get("hyper_parameters", {}).get("n_features")}
        settings += _as_options("model", arguments | found[TRAINED_WITH])
    activations = found.get(_class_of(config.data), {}).get("activations", {})
    read = {name: value for name, value in activations.items() if name != "weights"}
    settings += _as_options("data", read)
    return [*tokens[:place], *settings, *tokens[place:]]


def _after_packaged(tokens: Sequence[str]) -> int:
    """Return the place after the last configuration that ships with the package; 0 without one."""
    last = 0
    for place, token in enumerate(tokens, start=1):
        key, given, name = token.partition("=")
        if key not in ("-c", "--config"):
            continue
        end = place if given else place + 1
        name = name if given else "".join(tokens[place:end])
        if not Path(name).is_file() and find_config(name) != name:
            last = end
    return last


def _class_of(config: Any) -> str:
    return str(config.get("class_path", "")).rpartition(".")[2]


def _as_options(prefix: str, values: dict[str, Any]) -> list[str]:
    known = {name: value for name, value in values.items() if value is not None}
    return [f"--{prefix}.{name}={value}" for name, value in known.items()]
