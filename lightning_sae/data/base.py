"""What every data module does: stream a frozen model's activations, and keep its place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.contexts import Contexts
from lightning_sae.data.frozen_model import FrozenModel
from lightning_sae.data.modality import Modality
from lightning_sae.data.stream import ActivationStream, Cursor, HeldOutBatches, Read
from lightning_sae.parallel.legacy import world_size
from lightning_sae.residual_stream import ResidualStream

__all__ = ["FrozenModelDataModule"]


class FrozenModelDataModule(pl.LightningDataModule, ABC):
    """Activations of one layer of a frozen model: endless, shuffled, resumable.

    Training batches are tensors (tokens, d_model), float32: `batch_size` tokens over all devices.
    The stream never ends (give the Trainer `max_steps`) and is a function of the arguments
    alone: it does not depend on the number of devices, and a run resumed from a checkpoint goes
    on bit for bit where it was. Validation, test and prediction batches are `HeldOutBatch`
    dictionaries of inputs that are never trained on.

    A subclass says what the inputs are, which of their positions count, and how they are read.

    Args:
        model: What is read.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        lm_batch_size: Inputs of one forward pass of the model.
        cache_dir: Folder to keep activations in. None: keep none.
        seed: Seed of every choice and shuffle.
    """

    modality: ClassVar[Modality]
    place: ClassVar[tuple[str, ...]]
    """The arguments that decide which inputs a place in the stream stands for."""

    def __init__(
        self,
        model: FrozenModel,
        *,
        batch_size: int,
        batches_per_block: int,
        lm_batch_size: int,
        cache_dir: str | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size  # the name that Lightning's batch size finder looks for
        self.batches_per_block = batches_per_block
        self.lm_batch_size = lm_batch_size
        self.cache_dir = cache_dir
        self.seed = seed
        self._cursor: Cursor = (0, 0)
        self._model = model

    @property
    def d_model(self) -> int:
        """Width of the residual stream, known without loading any weights.

        Raises:
            ValueError: There is no such model, or it has no such layer.
        """
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def residual_stream(self) -> ResidualStream:
        """The layer of the frozen model, on the trainer's device; loaded at first use."""
        return self._model.residual_stream(self._device)

    def prepare_data(self) -> None:
        """Prepares what to train on, once per machine; its other processes find it on disk."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._train_inputs()

    def train_dataloader(self) -> ActivationStream:
        """The endless stream of `TrainBatch` dictionaries, from where training was left.

        Raises:
            ValueError: The devices cannot share a batch equally.
        """
        ranks = world_size()
        if self.batch_size % ranks:
            raise UsageError(f"batch_size={self.batch_size} cannot be shared by {ranks} devices")
        inputs, read = self._train_inputs()
        tokens = self._tokens_per_input()
        # A quarter of a batch makes up for special tokens; the rest of it is dropped.
        size = math.ceil((self.batches_per_block + 0.25) * self.batch_size / tokens)
        minimum = math.ceil(self.batch_size / tokens)
        return ActivationStream(
            blocks=partial(inputs.blocks, size, minimum),
            kept=self._kept,
            read=read,
            batch_size=self.batch_size,
            lm_batch_size=self.lm_batch_size,
            seed=self.seed,
            source=str(self._model),
            start=self._start,
            ahead=self._may_read_ahead,
        )

    def val_dataloader(self) -> HeldOutBatches:
        """`HeldOutBatch` dictionaries of the first `validation_tokens` held out."""
        return self._held_out_batches("validation")

    def test_dataloader(self) -> HeldOutBatches:
        """`HeldOutBatch` dictionaries of the next `test_tokens` held out."""
        return self._held_out_batches("test")

    def predict_dataloader(self) -> HeldOutBatches:
        """The batches of `test_dataloader`."""
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes the cursor off a training batch; Lightning calls this when it consumes a batch.

        It fetches batches ahead, so the last one fetched would be too far.
        """
        if not (isinstance(batch, dict) and "cursor" in batch):
            return batch
        self._cursor = batch["cursor"]
        return batch["activations"]

    def state_dict(self) -> dict[str, Any]:
        """The place right after the batch consumed last, and the arguments that give it meaning."""
        return {"cursor": self._cursor, "place": {name: self.hparams[name] for name in self.place}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues right after the batch that was consumed last when the state was saved."""
        block, batch = self._cursor = state_dict["cursor"]
        for name, before in state_dict["place"].items():
            if self.hparams[name] != before:
                rank_zero_warn(
                    f"{name}={self.hparams[name]!r} was {before!r} in the checkpoint: training "
                    f"continues at batch {batch} of block {block}, which is other "
                    f"{self.modality.argument} now"
                )

    @abstractmethod
    def _tokens_per_input(self) -> int:
        """Positions of an input to train on, special tokens not considered."""

    @abstractmethod
    def _kept(self, inputs: Tensor) -> Tensor:
        """Which positions are trained and measured on: a bool mask, (inputs, length)."""

    @abstractmethod
    def _train_inputs(self) -> tuple[Contexts, Read]:
        """The inputs to train on, and what reads them."""

    @abstractmethod
    def _held_out_inputs(self, stage: str) -> tuple[Tensor, Read]:
        """The inputs for "validation" or "test", and what reads them."""

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    @property
    def _may_read_ahead(self) -> bool:
        # The default dtype is that of all threads. In a step of "bf16-true", say, it is bfloat16,
        # and while a bfloat16 model is loaded, which with a cache may be at any time.
        precision = "32-true" if self.trainer is None else self.trainer.precision
        loaded_first = self.cache_dir is None or self._model.dtype == "float32"
        return loaded_first and precision in ("32-true", "bf16-mixed", "16-mixed")

    def _start(self) -> Cursor:
        # `Trainer(overfit_batches=n)` wants the same n batches in each epoch.
        return (0, 0) if getattr(self.trainer, "overfit_batches", 0) else self._cursor

    def _held_out_batches(self, stage: str) -> HeldOutBatches:
        inputs, read = self._held_out_inputs(stage)
        ranks, words = world_size(), self.modality
        if len(inputs) < ranks:
            raise UsageError(
                f"{stage}_tokens={self.hparams[f'{stage}_tokens']}: "
                f"{words.argument}={self.hparams[words.argument]!r} has {len(inputs)} held-out "
                f"{words.inputs} for it, {ranks} devices need one each"
            )
        return HeldOutBatches(
            contexts=inputs,
            kept=self._kept,
            read=read,
            lm_batch_size=self.lm_batch_size,
            source=str(self._model),
            modality=words,
        )

    def _check_at_least(self, least: dict[str, int]) -> None:
        """Raises ValueError if an argument is smaller than it should be."""
        for name, value in least.items():
            if self.hparams[name] < value:
                raise UsageError(f"{name}={self.hparams[name]} should be at least {value}")
