"""The folders of a run: its own as long as it lasts, and gone if nothing came of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sae.callbacks import WriteMatches
from lightning_sae.callbacks.held_folder import hold

__all__ = ["own_folders"]

LOGS: Final = ("config.yaml", "hparams.yaml", "metrics.csv", "events.out.tfevents.*")
"""Files that are worth nothing without a step."""
Made = list[Path]
"""A new folder, and those of its parents that are new, from below."""


@contextmanager
def own_folders(trainer: pl.Trainer, subcommand: str) -> Iterator[None]:
    """Give a run folders that no other run writes to.

    A logger that numbers its runs gets the first number that is free, which is taken by making the
    folder: two runs that start together get one each. Folders that the user names are held.

    If the run fails before its first step, or is no training, new folders go again in which there
    is nothing but logs. What anyone else put there is left alone.

    Args:
        trainer: That of the run, before it.
        subcommand: What it does: fit, validate, test or predict.

    Raises:
        UsageError: If another run holds one of the folders.
        OSError: If one cannot be made.
    """
    run = _Run()
    _callbacks(trainer).insert(0, run)
    made: list[Made] = []
    with ExitStack() as held:
        try:
            if trainer.is_global_zero:  # no other rank writes to them
                _take(trainer, subcommand, made, held)
            yield
        except BaseException:
            if subcommand != "fit" or not run.has_stepped:
                _remove(made)
            raise


class _Run(Callback):
    """What the processes of a run know of it, among them those that `ddp_spawn` starts."""

    def __init__(self) -> None:
        self._first = 0  # step
        self._stepped = torch.tensor(False).share_memory_()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let all ranks have the versions that the first has taken."""
        for logger in _local_loggers(trainer):
            logger._version = trainer.strategy.broadcast(logger.version)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where a run starts that may be a resumed one."""
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note whether this run has taken a step of its own."""
        if trainer.global_step > self._first:
            self._stepped.fill_(True)

    @property
    def has_stepped(self) -> bool:
        """Whether this run has taken a step of its own."""
        return bool(self._stepped)


def _take(trainer: pl.Trainer, subcommand: str, made: list[Made], held: ExitStack) -> None:
    """Make and hold the folders of a run, and list those that are new."""
    # Private: what is public cannot tell whether the user named a version, nor take another.
    unnamed = (each for each in _local_loggers(trainer) if each._version is None)
    made.extend(_take_number(logger) for logger in unnamed)
    for folder, key in _named(trainer, subcommand).items():
        made.append(_make(folder))
        held.enter_context(hold(folder, key))


def _named(trainer: pl.Trainer, subcommand: str) -> dict[Path, str]:
    """Return the folders that a run writes to, and the settings that name them."""
    folders: list[tuple[str | os.PathLike[str], str]] = []
    for logger in _local_loggers(trainer):
        key = "trainer.logger.init_args.version"
        folders += [(_folder(logger), key), (logger.log_dir, key)]
    for callback in _callbacks(trainer):
        if subcommand == "fit" and isinstance(callback, ModelCheckpoint):
            if callback.dirpath:
                folders.append((callback.dirpath, "dirpath"))
            elif not trainer.loggers:
                folders.append((trainer.default_root_dir, "trainer.default_root_dir"))
        if subcommand == "predict" and isinstance(callback, WriteMatches) and callback.output_dir:
            folders.append((callback.output_dir, "output_dir"))
    return {Path(path).resolve(): key for path, key in folders if "://" not in str(path)}


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return cast(list[Callback], cast(Any, trainer).callbacks)  # type checkers do not find it


def _local_loggers(trainer: pl.Trainer) -> list[TensorBoardLogger | CSVLogger]:
    """Return the loggers that give each run a folder on disk; others have places of their own."""
    local = (TensorBoardLogger, CSVLogger)
    found = (logger for logger in trainer.loggers if isinstance(logger, local))
    return [logger for logger in found if "://" not in logger.root_dir]


def _folder(logger: TensorBoardLogger | CSVLogger) -> Path:
    """Return where logs and checkpoints of a version are."""
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(os.path.expandvars(logger.root_dir), version).expanduser().resolve()


def _take_number(logger: TensorBoardLogger | CSVLogger) -> Made:
    """Make the folder of the first version, from the next one on, that nobody else makes."""
    while True:
        folder = _folder(logger)
        with suppress(FileNotFoundError):  # a run that failed has just removed the parent
            parents = _make(folder.parent)
            with suppress(FileExistsError):
                folder.mkdir()
                return [folder, *parents]
        logger._version = int(logger.version) + 1


def _make(folder: Path) -> Made:
    """Make a folder; the result is empty if it was there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(made: list[Made]) -> None:
    """Remove new folders that hold nothing but logs, and parents that hold nothing."""
    for folder, *parents in filter(None, reversed(made)):
        with suppress(OSError):  # something else is there
            files = list(folder.iterdir())
            if all(any(fnmatch(file.name, log) for log in LOGS) for file in files):
                for file in files:
                    file.unlink()
            for empty in (folder, *parents):
                empty.rmdir()
