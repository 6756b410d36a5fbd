"""Activations that a frozen model computes while the SAE trains: the base of their data modules."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.data.blocks import of_length
from lightning_sae.data.frozen_model import FrozenModel
from lightning_sae.data.stream_datamodule import StreamDataModule
from lightning_sae.residual_stream import ResidualStream

__all__ = ["FrozenModelDataModule"]


class FrozenModelDataModule(StreamDataModule):
    """Activations of one layer of a frozen model: endless, shuffled, resumable.

    Training batches are tensors (tokens, d_model), float32: `batch_size` tokens over all devices.
    The stream never ends (give the Trainer `max_steps`) and is a function of the arguments
    alone: it does not depend on the number of devices, a fit starts at its beginning, and one that
    is resumed from a checkpoint goes on bit for bit where it was. Validation, test and prediction
    batches are `HeldOutBatch` dictionaries of inputs that are never trained on.

    A data source of one's own is a subclass: `positions_per_input`, `train_inputs` and
    `held_out_inputs` are all that it must have. It may say which positions count (`kept`,
    `tokens_per_input`), how inputs are read (`read`), and what they are called (`source`, `noun`,
    `input_key`, `place`, `positions`). Its constructor passes on a model and the arguments below;
    one that takes `**options` for them has them on the command line too.

    Args:
        model: What is read.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        model_batch_size: Inputs of one forward pass of the model.
        validation_tokens: Positions of held-out inputs to validate on, in whole inputs.
        test_tokens: Positions of held-out inputs to test on: those that come after.
        cache_dir: Folder to keep activations in; runs that need them load no model. None: none.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_sae.data import LanguageModel
        >>> class Counting(FrozenModelDataModule):
        ...     positions_per_input = 16
        ...     def train_inputs(self):
        ...         return [torch.arange(16) + n for n in range(100)]
        ...     def held_out_inputs(self):
        ...         return [torch.arange(16) + n for n in range(100, 120)]
        >>> data = Counting(LanguageModel("quickstart", layer=2), batch_size=64)
        >>> next(iter(data.train_dataloader()))["activations"].shape
        torch.Size([64, 256])
    """

    place: ClassVar[tuple[str, ...]] = ("model_name", *StreamDataModule.place)

    def __init__(
        self,
        model: FrozenModel,
        *,
        batch_size: int = 4096,
        batches_per_block: int = 32,
        model_batch_size: int = 32,
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        require_positive(model_batch_size=model_batch_size)
        super().__init__(
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            seed=seed,
        )
        self.model = model
        self.model_batch_size = model_batch_size
        self.cache_dir = cache_dir

    @property
    @abstractmethod
    def positions_per_input(self) -> int:
        """Positions at which the model is read of one input: the length of a context, say."""

    def read(self, inputs: Tensor) -> Tensor:
        """Return the activations of inputs, (inputs, positions_per_input, d_model).

        A subclass whose inputs only stand for what the model reads makes that of them, and passes
        it on to this method. It is called in a thread of its own, with up to `model_batch_size`
        inputs, (inputs, ...), of which each process reads a share.
        """
        activations = self.model.reader(self._device, self.cache_dir)(inputs)
        return of_length(activations, self.positions_per_input, self.noun)

    @property
    def inputs_at_once(self) -> int:
        """Inputs of one forward pass of the model."""
        return self.model_batch_size

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        return self.model.name

    @property
    def d_model(self) -> int:
        """Width of the residual stream, known without loading any weights.

        Raises:
            UsageError: If there is no such model, or it has no such layer.
        """
        return self.model.d_model

    @property
    def description(self) -> dict[str, Any]:
        """What an activation is: the model by its name and its weights, the layer and the dtype."""
        return self.model.description

    def describe(self) -> dict[str, Any]:
        """Return what activations these are, as JSON has it: for the record of what learns them."""
        return super().describe() | self.model.names_elsewhere

    @property
    def residual_stream(self) -> ResidualStream:
        """The layer of the frozen model, on the trainer's device; loaded at first use."""
        return self.model.residual_stream(self._device)

    @property
    def _what_is_read(self) -> str:
        return str(self.model)

    @property
    def _may_read_ahead(self) -> bool:
        # While a bfloat16 model is loaded, which with a cache may be at any time, the default
        # dtype of all threads is bfloat16.
        loaded_first = self.cache_dir is None or self.model.dtype == "float32"
        return loaded_first and super()._may_read_ahead
