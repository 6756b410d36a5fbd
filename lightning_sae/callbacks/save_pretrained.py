"""A folder that others can load, kept as fresh as the checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sae.pretrained import PretrainedAutoencoder
from lightning_sae.temporary import left_behind, temporary_of


class SavePretrained(Callback):
    """Saves the SAE by `save_pretrained` with every checkpoint, and when training ends.

    The folder is `pretrained` in that of the run, or among its checkpoints where the logger has no
    folder for each run. What the SAE is worth is known from the last validation, so the figures are
    those of the end only after the end. An SAE that is a part of another module is saved too, under
    its name there, and so is each of several that are trained together.

    It does nothing where features are shared out over devices: no process has all of them.

    Args:
        dirpath: Another folder to save to.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the weights that the checkpoint has."""
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the weights of the end, and say where."""
        for folder in self._save(trainer, pl_module):
            rank_zero_info(f"The SAE is in {folder}: lightning_sae.load({str(folder)!r})")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Path]:
        """Return the folders that were saved; none before the first step, nor on other ranks."""
        root = self._folder(trainer)  # on all ranks, for Lightning has them agree on it
        only_tried: bool = cast(Any, trainer).fast_dev_run
        if not trainer.is_global_zero or trainer.global_step == 0 or only_tried:
            return []
        saved = []
        for name, sae in _saes(pl_module):
            folder = Path(root, *name.split(".")) if name else root
            try:
                _replace(folder, sae)
                saved.append(folder)
            except TypeError as error:  # what JSON has no word for; checkpoints may have it
                rank_zero_warn(f"An argument of {type(sae).__name__} keeps it unsaved: {error}")
        return saved

    def _folder(self, trainer: pl.Trainer) -> Path:
        """Return a folder that is this run's alone."""
        if self.dirpath is not None:
            return Path(self.dirpath)
        if isinstance(trainer.logger, TensorBoardLogger | CSVLogger):  # which number runs
            return Path(str(trainer.log_dir), "pretrained")
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(checkpoints or trainer.default_root_dir, "pretrained")


def _saes(module: pl.LightningModule) -> list[tuple[str, PretrainedAutoencoder]]:
    """Return the SAEs in a module, which may be one itself, whose rows are all here."""
    found = module.named_modules()
    saes = [(name, each) for name, each in found if isinstance(each, PretrainedAutoencoder)]
    return [(name, sae) for name, sae in saes if sae.layout.share.mesh is None]


def _replace(folder: Path, sae: PretrainedAutoencoder) -> None:
    """Save to a folder; each of its files is the earlier one or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.absolute().with_name(f".{folder.name}")
    temporary = temporary_of(beside)
    try:
        sae.save_pretrained(temporary)
        for file in sorted(temporary.iterdir(), reverse=True):  # the weights first
            file.replace(folder / file.name)
    finally:
        for each in (temporary, *left_behind(beside)):
            shutil.rmtree(each, ignore_errors=True)
