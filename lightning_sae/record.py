"""What is known of an autoencoder's training: checkpoints and folders have it with them."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sae.checkpointed import CheckpointedAutoencoder
from lightning_sae.part import ALONE, Part

__all__ = ["RecordedAutoencoder"]


class RecordedAutoencoder(CheckpointedAutoencoder):
    """Notes what a Trainer trains it on, and what it is worth.

    Attributes:
        record: What is known of its training, as JSON has it: `trained_on`, which activations of
            which model and text, and `measured`, the figures of the last validation, and the L0 of
            the last training batch. A Trainer fills it in; checkpoints and folders have it.
    """

    _part: Part = ALONE

    def __init__(self, d_model: int, n_features: int, **options: Any) -> None:
        super().__init__(d_model, n_features, **options)
        self.record: dict[str, dict[str, Any]] = {}

    @property
    def part(self) -> Part:
        """Which of several it is that are trained together; the whole where it is by itself."""
        by_itself = self._trainer is not None and self._trainer.lightning_module is self
        return ALONE if by_itself else self._part

    @part.setter
    def part(self, part: Part) -> None:
        self._part = part

    def on_fit_start(self) -> None:
        """Note what it is to be trained on: it may be exported after, without a checkpoint."""
        super().on_fit_start()
        self._noted()

    def log(self, name: str, *args: Any, **options: Any) -> None:
        """Log as Lightning does; as one of several, by what trains them all, under its own name."""
        if self.part is ALONE:
            super().log(name, *args, **options)
        else:
            self.trainer.lightning_module.log(self.part.curve(name), *args, **options)

    def on_train_end(self) -> None:
        """Note also what is known only by now: which module was read, and matches in training."""
        self._noted()
        if found := self._in_training():
            self.record["measured"] = self.record.get("measured", {}) | found

    def note_figures(self) -> None:
        """Note what a validation has logged, callbacks too: called at the end of its epoch."""
        own = self.part.curve("val/")
        figures = {
            name.removeprefix(own): _number(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith(own)
        }
        measured = {"tokens_seen": int(self.tokens_seen), **figures, **self._in_training()}
        self.record["measured"] = measured

    def notes(self) -> dict[str, Any]:
        """Return also what is known of the training."""
        return super().notes() | {"record": self._noted()}

    def take_notes(self, checkpoint: dict[str, Any]) -> None:
        """Take over also what the checkpoint notes of the training so far."""
        super().take_notes(checkpoint)
        self.record = dict(checkpoint.get("record", {}))

    def _noted(self) -> dict[str, dict[str, Any]]:
        """Return the record, with what the SAE is being trained on."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
            if describe is not None:
                self.record["trained_on"] = self.part.of_description(describe())
        return self.record

    def _in_training(self) -> dict[str, float | None]:
        """Return the L0 of the last training batch; that noted before, if this Trainer had none."""
        logged, name = self.trainer.callback_metrics, "l0_in_training"
        if (curve := self.part.curve("train/l0")) in logged:
            return {name: _number(logged[curve])}
        before = self.record.get("measured", {})
        return {name: before[name]} if name in before else {}


def _number(value: Tensor) -> float | None:
    """Return what JSON can hold."""
    number: float = value.item()
    return number if math.isfinite(number) else None
