"""The base of every data module: activations as an endless stream, wherever they come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sae.checks import UsageError, require_at_least, require_positive
from lightning_sae.data.blocks import Inputs, Marks, endless_blocks, held_out_parts, stacked
from lightning_sae.data.place import KeepsPlace
from lightning_sae.data.provenance import ORDER, compare, fingerprint
from lightning_sae.data.stream import ActivationStream, HeldOutBatches
from lightning_sae.hyperparameters import plain
from lightning_sae.parallel import ranks_of

__all__ = ["StreamDataModule"]


class StreamDataModule(KeepsPlace, ABC):
    """Activations as an endless, shuffled stream that resumes where it was.

    Training batches are tensors (tokens, d_model), float32: `batch_size` tokens over all devices.
    The stream never ends (give the Trainer `max_steps`) and is a function of the arguments
    alone: it does not depend on the number of devices, a fit starts at its beginning, and one that
    is resumed from a checkpoint goes on bit for bit where it was. Validation, test and prediction
    batches are `HeldOutBatch` dictionaries of inputs that are never trained on.

    An input is what stands for some neighbouring activations: a context, an image, a place in a
    file. A subclass says which there are and how they are read. `FrozenModelDataModule` is the one
    for activations that a model computes meanwhile, `StoredActivationsDataModule` that for those
    that lie in files.

    Args:
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        validation_tokens: Positions of held-out inputs to validate on, in whole inputs.
        test_tokens: Positions of held-out inputs to test on: those that come after.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range.
    """

    source: str = "the data"
    """What messages call the data: best the argument that names them, and its value."""
    input_key: ClassVar[str] = "input_ids"
    """The key of the inputs in a held-out batch. Of token ids it is this one for all callbacks."""
    positions: ClassVar[str] = "all"
    """Which positions of an input are trained and measured on, in words."""

    def __init__(
        self,
        *,
        batch_size: int = 4096,
        batches_per_block: int = 32,
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(batch_size=batch_size, batches_per_block=batches_per_block)
        require_positive(validation_tokens=validation_tokens, test_tokens=test_tokens)
        require_at_least(0, seed=seed)
        self.batch_size = batch_size  # the name that Lightning's batch size finder looks for
        self.batches_per_block = batches_per_block
        self.validation_tokens = validation_tokens
        self.test_tokens = test_tokens
        self.seed = seed
        self._marks: Marks = {}

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the activations."""

    @property
    def widths(self) -> list[int]:
        """The width of each of the sites that are read, whose activations are beside each other."""
        return [*self.sites.values()]

    @property
    def sites(self) -> dict[str, int]:
        """The same by the name of each site; "" of activations without one."""
        return {"": self.d_model}

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What the activations are, as JSON has it; a checkpoint of others is refused."""

    @property
    @abstractmethod
    def positions_per_input(self) -> int:
        """Positions at which activations are read of one input: the length of a context, say."""

    @property
    @abstractmethod
    def inputs_at_once(self) -> int:
        """Inputs that are read at once, and that a held-out batch has."""

    @abstractmethod
    def train_inputs(self) -> Inputs:
        """Return the inputs to train on; called once in a process.

        Returns:
            Tensors of one shape. A list of them, a tensor (inputs, ...) or a map-style `Dataset` of
            torch comes each epoch in a new order. Any other iterable that starts afresh each time,
            for data that are too many to be stored, comes in its own; a generator does not.
        """

    @abstractmethod
    def held_out_inputs(self) -> Inputs:
        """Return inputs that are never trained on; called once in a process.

        The first `validation_tokens` of them are validated on, and the next `test_tokens` tested.
        """

    @abstractmethod
    def read(self, inputs: Tensor) -> Tensor:
        """Return the activations of inputs, (inputs, positions_per_input, d_model).

        It is called in a thread of its own, with up to `inputs_at_once` inputs, (inputs, ...), of
        which each process reads a share.
        """

    def read_held_out(self, inputs: Tensor) -> Tensor:
        """Return the activations of inputs that are held out: those that `read` returns."""
        return self.read(inputs)

    @property
    def tokens_per_input(self) -> int:
        """Positions of an input that are trained on, at most; a block's size follows from it."""
        return self.positions_per_input

    @property
    def inputs_per_block(self) -> int:
        """Inputs whose tokens are shuffled together."""
        # A quarter of a batch makes up for special tokens; the rest of it is dropped.
        tokens = (self.batches_per_block + 0.25) * self.batch_size
        return math.ceil(tokens / self.tokens_per_input)

    def kept(self, inputs: Tensor) -> Tensor:
        """Return which positions are trained and measured on; by default all.

        Args:
            inputs: Some of them, (inputs, ...).

        Returns:
            A bool mask, (inputs, positions_per_input).
        """
        return torch.ones(len(inputs), self.positions_per_input, dtype=torch.bool)

    def describe(self) -> dict[str, Any]:
        """Return what activations these are, as JSON has it: for the record of what learns them."""
        names = (*(name for name in self.place if name not in ORDER), "positions")
        return self.description | {name: plain(getattr(self, name)) for name in names}

    def prepare_data(self) -> None:
        """Prepare what to train on, once per machine; its other processes find it on disk."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            _ = self._train_inputs

    def train_dataloader(self) -> ActivationStream:
        """Return the endless stream of `TrainBatch` dictionaries, from where training was left.

        Raises:
            UsageError: If the devices cannot share a batch equally.
        """
        ranks = ranks_of(self.trainer)
        if self.batch_size % ranks.size:
            raise UsageError(
                f"batch_size={self.batch_size} cannot be shared by {ranks.size} devices"
            )
        _ = self.description  # of which checkpoints take a note, and no later than now
        blocks = partial(
            endless_blocks,
            self._train_inputs,
            size=self.inputs_per_block,
            minimum=math.ceil(self.batch_size / self.tokens_per_input),
            seed=self.seed,
            source=self.source,
            noun=self.noun,
            marks=self._marks,
        )
        return ActivationStream(
            blocks=blocks,
            kept=self.kept,
            read=self.read,
            batch_size=self.batch_size,
            model_batch_size=self.inputs_at_once,
            seed=self.seed,
            source=self._what_is_read,
            start=self._start,
            ranks=ranks,
            ahead=self._may_read_ahead,
            left=self._batches_left,
        )

    def val_dataloader(self) -> HeldOutBatches:
        """Return `HeldOutBatch` dictionaries of the first `validation_tokens` held out."""
        return self._held_out_batches("validation", self.validation_tokens)

    def test_dataloader(self) -> HeldOutBatches:
        """Return `HeldOutBatch` dictionaries of the next `test_tokens` held out."""
        return self._held_out_batches("test", self.test_tokens)

    def predict_dataloader(self) -> HeldOutBatches:
        """Return the batches of `test_dataloader`."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the place right after the batch consumed last, and what was read up to there."""
        needed = "_train_inputs" in vars(self)
        inputs = self._inputs_fingerprint if needed else None
        noted = {"activations": self.description, "inputs": inputs}
        place = super().state_dict()
        if (mark := self._marks.get(place["cursor"][0])) is not None:
            noted["reading"] = mark
        return place | noted

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue right after the batch that was consumed last when the state was saved.

        Raises:
            UsageError: If it is of other activations or, if training is to continue, other inputs.
        """
        resumed = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if resumed:
            _ = self._train_inputs
        here = self.state_dict()
        compare(here, state_dict, resumed, self.source)
        if "reading" in state_dict and here["place"] == state_dict["place"]:
            self._marks[state_dict["cursor"][0]] = state_dict["reading"]
        super().load_state_dict(state_dict)

    @property
    def _what_is_read(self) -> str:
        """What a message calls it that finds activations which are no numbers."""
        return self.source

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    @property
    def _may_read_ahead(self) -> bool:
        # The default dtype is that of all threads. In a step of "bf16-true", say, it is bfloat16.
        precision = "32-true" if self.trainer is None else self.trainer.precision
        return precision in ("32-true", "bf16-mixed", "16-mixed")

    def _batches_left(self) -> int | None:
        """Return how many batches the Trainer's steps will still take; None if it has no number."""
        if self.trainer is None or self.trainer.max_steps < 0:
            return None
        steps = self.trainer.max_steps - self.trainer.global_step
        return steps * self.trainer.accumulate_grad_batches

    @cached_property
    def _train_inputs(self) -> Inputs:
        return self.train_inputs()

    @cached_property
    def _inputs_fingerprint(self) -> str | None:
        return fingerprint(self._train_inputs)

    @cached_property
    def _held_out_inputs(self) -> dict[str, list[Tensor]]:
        """The inputs of "validation" and "test"."""
        validation, test = self.validation_tokens, self.test_tokens
        length = self.positions_per_input
        require_at_least(length, validation_tokens=validation, test_tokens=test)
        counts = {"validation": validation // length, "test": test // length}
        return held_out_parts(self.held_out_inputs(), **counts, source=self.source, noun=self.noun)

    def _held_out_batches(self, stage: str, tokens: int) -> HeldOutBatches:
        inputs, ranks = self._held_out_inputs[stage], ranks_of(self.trainer)
        if len(inputs) < ranks.size:
            who = f"{ranks.size} devices need one each" if ranks.size > 1 else "and needs one"
            raise UsageError(
                f"{stage}_tokens={tokens}: {self.source} has {len(inputs)} held-out {self.noun} "
                f"for it, {who}"
            )
        return HeldOutBatches(
            inputs=stacked(inputs, self.source, self.noun),
            kept=self.kept,
            read=self.read_held_out,
            model_batch_size=self.inputs_at_once,
            source=f"{self._what_is_read}, held-out {self.noun}",
            key=self.input_key,
            ranks=ranks,
        )
