"""What a LightningModule is saved and resumed by, whatever of ours it trains."""

from __future__ import annotations

from typing import Any, Self

import lightning.pytorch as pl
from torch import Tensor

from lightning_sae.checkpoint_format import upgrade
from lightning_sae.checkpoint_io import in_present_format
from lightning_sae.checks import UsageError
from lightning_sae.hyperparameters import PlainHyperparameters
from lightning_sae.optim.logged_steps import write_curves
from lightning_sae.optim.resumption import Resumption

__all__ = ["SAEModule"]


class SAEModule(PlainHyperparameters, pl.LightningModule):
    """A module that goes on from a checkpoint as if it had not stopped, and runs nothing in it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._resumption = Resumption()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load what was trained as Lightning does, running nothing that the file or URL may hold.

        In Lightning 2.6.6 a checkpoint can name functions to call in place of an optimizer, also
        one loaded with `weights_only=True`; `LightningModule.load_from_checkpoint` calls them.

        Raises:
            UsageError: If it is damaged, has arguments that this class has not, or is given another
                value of one of the `code_settings` than it was trained with.
        """
        safe = {"weights_only": True, "_instantiator": None}
        path = in_present_format(checkpoint_path)
        try:
            return super().load_from_checkpoint(path, *args, **(kwargs | safe))
        except TypeError as error:
            raise UsageError(f"{checkpoint_path} is not of a {cls.__name__}: {error}") from error

    def on_fit_start(self) -> None:
        """Have the optimizers take no state from a checkpoint that they could not have made."""
        if self._trainer is not None:
            names: dict[Tensor, str] = {each: name for name, each in self.named_parameters()}
            self._resumption.watch(self._trainer, names)

    def on_train_start(self) -> None:
        """Say which settings of a resumed run are others than those of its checkpoint."""
        self._resumption.tell()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write curves up to here; note what tells checkpoints apart that do not fit."""
        if self._trainer is not None:
            write_curves(self._trainer)
        checkpoint.update(self.notes())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else; bring an older one up to date.

        Raises:
            UsageError: If it is one, and the message names both; or if it lacks what a run needs.
        """
        upgrade(checkpoint)
        self.take_notes(checkpoint)
        if self._trainer is not None:
            self._resumption.read(self._trainer, checkpoint)

    def notes(self) -> dict[str, Any]:
        """Return what checkpoints hold beside what Lightning saves."""
        return {}

    def take_notes(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is of something else, and take over what it notes."""
