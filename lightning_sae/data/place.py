"""A data module's place in its stream: what checkpoints note, and where a fit begins."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_sae.data.stream import Cursor
from lightning_sae.hyperparameters import PlainHyperparameters, plain

__all__ = ["KeepsPlace"]


class KeepsPlace(PlainHyperparameters, pl.LightningDataModule):
    """A data module of an endless stream whose batches carry the place after them.

    A fit goes on from its checkpoint, or from what its own Trainer has read before. Any other
    starts at the beginning, whatever this data module was used for.
    """

    noun: ClassVar[str] = "inputs"
    """What messages call the inputs, in the plural."""
    place: ClassVar[tuple[str, ...]] = ("batch_size", "batches_per_block", "seed")
    """The attributes, numbers or strings, that decide which inputs a place in the stream means.

    Checkpoints note them; who goes on with others is warned or refused. A subclass adds its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cursor: Cursor = (0, 0)
        self._moved_by: TrainerState | None = None  # None: no Trainer, or a state that was loaded

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the cursor off a training batch; Lightning calls this when it consumes a batch.

        It fetches batches ahead, so the last one fetched would be too far.
        """
        if not (isinstance(batch, dict) and "cursor" in batch):
            return batch
        # The state is as unique as the Trainer, and keeps no model of an earlier fit in memory.
        self._moved_by = None if self.trainer is None else self.trainer.state
        self._cursor = batch["cursor"]
        return batch["activations"]

    def state_dict(self) -> dict[str, Any]:
        """Return the place right after the batch consumed last, and what gives it meaning."""
        place = {name: plain(getattr(self, name)) for name in self.place}
        return {"cursor": self._here, "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue right after the batch that was consumed last when the state was saved.

        A Trainer that only measures a checkpoint loads its state as well: that moves nothing.
        """
        if self.trainer is not None and (self.trainer.evaluating or self.trainer.predicting):
            return
        block, batch = self._cursor = state_dict["cursor"]
        self._moved_by = None
        for name, before in state_dict["place"].items():
            now = plain(getattr(self, name, None))
            if now != before:
                rank_zero_warn(
                    f"{name}={now!r} was {before!r} in the checkpoint: training continues at batch "
                    f"{batch} of block {block}, which is of other {self.noun} now"
                )

    @property
    def _here(self) -> Cursor:
        # Asked rather than set as a fit begins: a subclass may have hooks of its own.
        if self._moved_by is None or self.trainer is None:
            return self._cursor
        state = self.trainer.state
        begins = state.fn == TrainerFn.FITTING and state is not self._moved_by
        return (0, 0) if begins else self._cursor

    def _start(self) -> Cursor:
        # `Trainer(overfit_batches=n)` wants the same n batches in each epoch.
        return (0, 0) if getattr(self.trainer, "overfit_batches", 0) else self._here
