"""What a checkpoint was trained with, in place of what a packaged configuration says."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_sae.checkpoint_format import PARTS, TRAINED_WITH, upgrade
from lightning_sae.checkpoint_io import open_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.cli.configurations import find_config
from lightning_sae.cli.trained import imported
from lightning_sae.data import StreamDataModule
from lightning_sae.data.provenance import require_same_activations
from lightning_sae.interop import FoldedSAE, unfold
from lightning_sae.pretrained import config_of
from lightning_sae.quickstart import packaged_sae
from lightning_sae.sae import SparseAutoencoder

__all__ = ["of_another_library", "of_folder", "tell_changes", "with_its_settings"]

ACTIVATIONS: Final = ("model_name", "layer", "site", "model_dtype")


def with_its_settings(
    tokens: Sequence[str], config: Any, foreign: FoldedSAE | None = None
) -> list[str]:
    """Return a command line that measures a checkpoint with what it was trained with.

    Its number of features, k and importance, and the model, layer and dtype it read come after the
    packaged configurations that begin it, which they overrule, and before what the user says: if
    that is other, the checkpoint is refused. An earlier version's notes none of it. An SAE of
    another library has the last word on its class and settings: nobody can know them beforehand.

    Args:
        tokens: The command line.
        config: What it was parsed to, of its subcommand.
        foreign: The SAE of another library that it names. None: it names none.
    """
    path = config.get("ckpt_path")
    several = "SeveralSAEs" in _kinds_of(config.model)
    if several and (foreign is not None or (path and Path(packaged_sae(path)).is_dir())):
        raise UsageError(
            f"ckpt_path={path} holds one SAE, and model=SeveralSAEs is measured from a checkpoint "
            "of all: take the configuration of one, topk.yaml say"
        )
    if foreign is not None:
        return [*tokens, *_of_foreign(foreign, config)]
    place = _after_packaged(tokens)
    if place == 0 or not path:
        return list(tokens)
    try:
        found = _noted_in(config)
    except (UsageError, OSError):  # which is told when the run begins
        return list(tokens)
    if several != (PARTS in found):  # which is refused when the run begins
        return list(tokens)
    settings = []
    if found.get("architecture") in _kinds_of(config.model) and TRAINED_WITH in found:
        arguments = {"n_features": found.get("hyper_parameters", {}).get("n_features")}
        # That of the configuration need not take what a class of the user's does.
        settings.append(f"--model={config.model.class_path}")
        sae, key = (config.model.init_args.sae, "model.sae") if several else (config.model, "model")
        names = pkgutil.resolve_name(sae.class_path).code_settings
        noted = {name: value for name, value in found[TRAINED_WITH].items() if name in names}
        settings += _as_options(key, arguments | noted)
    activations = found.get(_class_of(config.data), {}).get("activations", {})
    taken = config.data.get("init_args", {})  # a class of the user's may be about one model only
    # Whoever wrote the file may have noted a folder to write to beside them.
    names = [name for name in ACTIVATIONS if name in taken]
    read = {name: activations[name] for name in names if name in activations}
    settings += _as_options("data", read)
    return [*tokens[:place], *settings, *tokens[place:]]


def of_folder(model: SparseAutoencoder, data: Any, folder: str) -> SparseAutoencoder:
    """Return the SAE that a folder of `save_pretrained` holds, to be measured on some data.

    Args:
        model: What the configuration asks for: its class, and settings on which codes depend.
        data: A data module.
        folder: Where the SAE is.

    Raises:
        UsageError: If the SAE is another, or was trained on other activations.
    """
    asked = {name: model.hparams[name] for name in model.code_settings if name in model.hparams}
    kind = type(model)
    sae = kind.from_pretrained(folder, **asked)
    if isinstance(data, StreamDataModule):
        require_same_activations(data.description, sae.record.get("trained_on", {}))
    return sae


def of_another_library(
    model: SparseAutoencoder, data: Any, foreign: FoldedSAE
) -> SparseAutoencoder:
    """Return the SAE that another library has written, to be measured on some data.

    Args:
        model: One with the settings that `with_its_settings` found.
        data: A data module, on whose activations its mean and scale are measured.
        foreign: As `lightning_sae.interop.load_foreign` returns it.

    Raises:
        UsageError: If it is for activations of another width.
    """
    activations = data if isinstance(data, StreamDataModule) else None
    sae = imported(foreign, model.hparams.get("k"), activations)
    if sae.d_model != model.d_model:
        raise UsageError(
            f"ckpt_path: it is for activations {sae.d_model} wide, not d_model={model.d_model}"
        )
    return sae


def tell_changes(packaged: Any, config: Any) -> None:
    """Warn in one line of what is measured with other settings than packaged ones.

    Args:
        packaged: What the user's command line was parsed to, of its subcommand.
        config: What it is with the settings of the checkpoint.
    """
    before, now = (dict(each.items()) for each in (packaged, config))
    changed = [
        f"{key.replace('.init_args', '')}={now[key]!r} (not {before[key]!r})"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    if changed:
        rank_zero_warn(f"Measured with what is in the checkpoint: {', '.join(changed)}")


def _of_foreign(foreign: FoldedSAE, config: Any) -> list[str]:
    """Return class and settings of another library's SAE."""
    sae = unfold(foreign, config.model.get("init_args", {}).get("k"))
    names = ("n_features", *sae.code_settings)
    settings = {name: sae.hparams[name] for name in names if name in sae.hparams}
    return [f"--model=lightning_sae.{type(sae).__name__}", *_as_options("model", settings)]


def _after_packaged(tokens: Sequence[str]) -> int:
    """Return the place after the packaged configurations that the user begins with; 0 without one.

    What comes after something of the user's own about the model or the data overrules that, and so
    must not be overruled itself.
    """
    last = 0
    for place, token in enumerate(tokens, start=1):
        key, given, name = token.partition("=")
        if key.startswith(("--model", "--data")):
            break
        if key not in ("-c", "--config"):
            continue
        end = place if given else place + 1
        name = name if given else "".join(tokens[place:end])
        if Path(name).is_file() or find_config(name) == name:
            break
        last = end
    return last


def _noted_in(config: Any) -> dict[str, Any]:
    """Return what is noted in a checkpoint, or in a folder as a checkpoint would have it."""
    path = packaged_sae(config.ckpt_path)
    if not Path(path).is_dir():
        found = open_checkpoint(path)
        upgrade(found)
        return found
    noted = config_of(path)
    trained_on = noted.get("trained_on", {})
    activations = {name: trained_on[name] for name in ACTIVATIONS if name in trained_on}
    return {
        "architecture": noted["architecture"],
        "hyper_parameters": noted["arguments"],
        TRAINED_WITH: noted["arguments"],
        _class_of(config.data): {"activations": activations},
    }


def _kinds_of(config: Any) -> list[str]:
    """Return the names of a class and of those that it extends."""
    kind: Any = pkgutil.resolve_name(config.class_path)
    return [each.__name__ for each in getattr(kind, "__mro__", ())]


def _class_of(config: Any) -> str:
    return str(config.get("class_path", "")).rpartition(".")[2]


def _as_options(prefix: str, values: dict[str, Any]) -> list[str]:
    known = {name: value for name, value in values.items() if value is not None}
    return [f"--{prefix}.{name}={value}" for name, value in known.items()]
