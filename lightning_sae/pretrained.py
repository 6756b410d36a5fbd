"""An autoencoder as a folder that stands alone: weights, settings, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH
from lightning_sae.checkpoint_io import read_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.core.state_format import require_known
from lightning_sae.model_card import model_card
from lightning_sae.quickstart import packaged_sae
from lightning_sae.record import RecordedAutoencoder
from lightning_sae.tensor_files import save_tensors

__all__ = ["CONFIG", "WEIGHTS", "PretrainedAutoencoder", "config_of", "may_be_repository"]

CONFIG: Final = "config.json"
"""The file that says what an SAE is."""
WEIGHTS: Final = "model.safetensors"
"""The file that has its tensors."""
RECORD: Final = ("trained_on", "measured")
NOT_THERE: Final = (UsageError, OSError, HFValidationError)
"""What is raised of a path with no SAE in it: hub's errors of HTTP are OSErrors."""


class PretrainedAutoencoder(
    RecordedAutoencoder,
    ModelHubMixin,
    library_name="lightning_sae",
    tags=["sparse-autoencoder"],
):
    """Saves and loads what Hugging Face calls a pretrained model, on disk and on the hub.

    `save_pretrained(folder)` writes `model.safetensors`, `config.json` and a model card. Nothing in
    them runs when they are read, and there are no optimizer states: a third of a checkpoint.
    `from_pretrained` and `push_to_hub` are huggingface_hub's.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        start_from: A trained SAE of any architecture and the same shape, whose dictionary and
            densities the Trainer's `fit` starts from: a checkpoint, a folder, or the id of a
            repository on the hub. One that has seen tokens already goes on as it is.
        options: Those of `lightning_sae.core.Autoencoder`.
    """

    def __init__(
        self, d_model: int, n_features: int, *, start_from: str | None = None, **options: Any
    ) -> None:
        super().__init__(d_model, n_features, **options)
        self.start_from = start_from

    def setup(self, stage: str) -> None:
        """Load the dictionary to start from, unless this one is trained by now, or will be resumed.

        Raises:
            UsageError: If there is none, or it is of another shape or inputs of another scale.
        """
        fresh = self.history.tokens_seen == 0 and self.trainer.ckpt_path is None
        if stage == "fit" and self.start_from is not None and fresh:
            try:
                trained_with, state = _trained(self.start_from)
                before = trained_with.get("normalize_inputs", self.normalize_inputs)
                if before != self.normalize_inputs:
                    raise UsageError(
                        f"it was trained with normalize_inputs={before!r}: set that here too, in "
                        f"place of {self.normalize_inputs!r}"
                    )
                self.take_over(state)
            except NOT_THERE as error:
                raise UsageError(f"start_from={self.start_from}: {error}") from None

    def gate(self) -> Gate:
        """Return which affinities of a token are its code: what other libraries can say of it.

        An architecture that does not say it cannot be exported.

        Raises:
            UsageError: If that is so.
        """
        raise UsageError(
            f"{type(self).__name__} does not say by a method `gate` what its codes are"
        )

    def config(self) -> dict[str, Any]:
        """Return what `config.json` says: the class, its arguments, and the record."""
        return {
            KEY: FORMAT,
            "architecture": type(self).__name__,
            "arguments": dict(self.hparams),
            **self._noted(),
        }

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Save to a folder, as huggingface_hub does; and write its model card anew, unless edited.

        Args:
            save_directory: The folder.
            options: As `huggingface_hub.ModelHubMixin.save_pretrained` takes them.

        Returns:
            The address of the commit, if it is pushed to the hub.
        """
        _remove_card(Path(save_directory), options.get("model_card_kwargs") or {})
        pushed: str | None = super().save_pretrained(save_directory, **options)
        return pushed

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return a model card that says what the SAE was trained on, and what it is worth."""
        return model_card(self.config(), **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.layout.share.mesh is not None:
            raise UsageError(
                "features are shared out over devices: load a checkpoint on one, and save that"
            )
        save_tensors(self.state_dict(), save_directory / WEIGHTS, format="pt")
        config = json.dumps(self.config(), indent=2)
        (save_directory / CONFIG).write_text(f"{config}\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load one as huggingface_hub does, or one that ships, `quickstart/topk` say."""
        sae: Self = super().from_pretrained(packaged_sae(pretrained_model_name_or_path), **options)
        return sae

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        config: dict[str, Any] | None = None,
        map_location: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        found = _checked(model_id, config)
        if found["architecture"] not in {kind.__name__ for kind in cls.__mro__}:
            raise UsageError(
                f"{model_id} is a {found['architecture']}, not a {cls.__name__}: "
                "lightning_sae.load finds the class by itself"
            )
        own = {name: value for name, value in options.items() if name not in found}
        for name in cls.code_settings:
            if name in own and own[name] != found["arguments"].get(name):
                raise UsageError(
                    f"{name}={own[name]!r}: {model_id} was trained with "
                    f"{name}={found['arguments'].get(name)!r}"
                )
        try:
            sae = cls(**found["arguments"] | own)
        except TypeError as error:
            raise UsageError(f"{model_id}: {error}") from error
        path = Path(model_id, WEIGHTS)
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        sae.load_state_dict(_tensors(path))
        sae.record = {name: found[name] for name in RECORD if name in found}
        return sae.to(map_location).eval()


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return the `config.json` of a folder that holds an SAE.

    Raises:
        UsageError: If there is none.
    """
    try:
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {CONFIG} of an SAE{_meant(Path(folder))}") from None
    except (OSError, ValueError) as error:  # the latter if it is no JSON, or no UTF-8
        raise UsageError(f"{folder} has no {CONFIG} of an SAE: {error}") from error
    return _checked(str(folder), config)


def may_be_repository(path: str | Path) -> bool:
    """Return whether what is no file or folder here may be the id of a repository on the hub."""
    name = str(path)
    return not (name.startswith((".", "/", "~")) or name.endswith(".ckpt") or name.count("/") > 1)


def _meant(folder: Path) -> str:
    """Return the end of a message about a folder that holds no SAE: where in it one is."""
    places = ("pretrained", "pretrained/*", "*/pretrained", "*/pretrained/*")
    found = [each.parent for place in places for each in folder.glob(f"{place}/{CONFIG}")]
    return f", did you mean '{max(found, key=_written)}'?" if found else ""


def _written(folder: Path) -> float:
    return folder.stat().st_mtime


def _trained(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the state of a trained SAE of whatever architecture."""
    where = Path(packaged_sae(path)).expanduser()
    if not where.is_dir():
        if where.is_file() or where.suffix == ".ckpt":
            found = read_checkpoint(where)
            return found.get(TRAINED_WITH, {}), found["state_dict"]
        if ":" in path:
            raise UsageError("another library's SAE must become ours first: lightning_sae import")
        if not may_be_repository(path):
            raise UsageError("there is no such file or folder")
        where = Path(hf_hub_download(path, CONFIG)).parent
        hf_hub_download(path, WEIGHTS)
    return config_of(where)["arguments"], _tensors(where / WEIGHTS)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise UsageError(f"{path} is damaged, or not there: {error}") from error


def _checked(where: str, config: Any) -> dict[str, Any]:
    """Return what a `config.json` says, up to date, or None if there is none.

    Raises:
        UsageError: If it is not that of an SAE, or of a later format than this version knows.
    """
    known = isinstance(config, dict) and isinstance(config.get("arguments"), dict)
    if not known or not isinstance(config.get("architecture"), str):
        raise UsageError(f"{where} has no {CONFIG} of an SAE")
    number = require_known(config.get(KEY))
    found: dict[str, Any] = config
    if number < FORMAT and "scope" in found["arguments"]:  # it chooses over the batch
        found["arguments"].setdefault("rank_discount", 0.0)
    return found


def _remove_card(folder: Path, options: Mapping[str, Any]) -> None:
    """Remove the model card of a folder if it is as `model_card` made it, with options or none."""
    card = folder / "README.md"
    try:  # else the hub's library keeps the card that an SAE before this one had
        config = config_of(folder)
        made = (str(model_card(config, **each)) for each in (options, {}))
        if str(ModelCard.load(card)) in made:
            card.unlink()
    except (UsageError, OSError, ValueError):  # none is there, or it is not ours
        return
