"""Activations that a frozen model computes while the SAE trains: the base of their data modules."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Final, cast, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_sae.checks import UsageError, require_choice, require_not_negative, require_positive
from lightning_sae.data.blocks import NumberedInputs, of_length
from lightning_sae.data.cache import ActivationCache
from lightning_sae.data.filling import CacheNeeds
from lightning_sae.data.frozen_model import Dtype, FrozenModel
from lightning_sae.data.stream import ActivationStream
from lightning_sae.data.stream_datamodule import StreamDataModule
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.several_sites import SeveralSites

__all__ = ["FrozenModelDataModule"]

_HELD_OUT: Final = ContextVar("held_out", default=False)
"""Whether what this thread reads is held out: a subclass's `read` stands between who knows and who
keeps it."""


class FrozenModelDataModule(StreamDataModule):
    """Activations of a frozen model at a layer, or several: endless, shuffled, resumable.

    Batches are those of `StreamDataModule`. Several sites are read in one pass of the model: their
    activations are beside each other, as wide as `widths` says.

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
        cache_dtype: What they are rounded to, for all that is trained and measured on, whether it
            was kept before or not: float16 takes half the space of float32. None: as they are.
        cache_limit_gb: Gigabytes that they may take. A run that would keep more is refused before
            it begins, where its length is known; any other keeps no more from there on.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range.

    Example:
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
        cache_dtype: Dtype | None = None,
        cache_limit_gb: float = 100,
        seed: int = 0,
    ) -> None:
        require_positive(model_batch_size=model_batch_size)
        require_not_negative(cache_limit_gb=cache_limit_gb)
        if cache_dtype is not None:
            require_choice(of=get_args(Dtype), cache_dtype=cache_dtype)
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
        self.cache_dtype = cache_dtype
        self.cache_limit_gb = cache_limit_gb

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
        read = self.model.reader(self._device, *self.cache_settings)
        kept = self.kept(inputs) if self._reads_inputs_as_they_are else None
        states = read(inputs, kept, _HELD_OUT.get())
        return of_length(states, self.positions_per_input, self.noun)

    def read_held_out(self, inputs: Tensor) -> Tensor:
        """Return what `read` does of inputs that are held out, which `cache_dir` notes of them."""
        token = _HELD_OUT.set(True)
        try:
            return self.read(inputs)
        finally:
            _HELD_OUT.reset(token)

    def train_dataloader(self) -> ActivationStream:
        """Return the endless stream of `TrainBatch` dictionaries, from where training was left.

        Raises:
            UsageError: If the devices cannot share a batch equally, or there is no room to keep
                what is read.
        """
        stream = super().train_dataloader()
        if self.cache_dir is not None:
            self.cache_needs(self._batches_left())
        return stream

    def cache_needs(self, batches: int | None) -> CacheNeeds | None:
        """Return what a run keeps in `cache_dir`; None if nobody knows how much that is.

        Args:
            batches: Those that it trains on. None: nobody knows how many, so all there are.

        Raises:
            UsageError: If with what is there that is more than `cache_limit_gb`, or than the disk
                has room for.
        """
        inputs = self._train_inputs
        training = len(cast(NumberedInputs, inputs)) if hasattr(inputs, "__len__") else None
        if batches is not None:
            read = math.ceil(batches / self.batches_per_block) * self.inputs_per_block
            training = read if training is None else min(read, training)
        if training is None:
            return None
        length = self.positions_per_input
        dtype = self.cache_dtype or self.model.dtype
        needs = CacheNeeds(
            training=training,
            held_out=self.validation_tokens // length + self.test_tokens // length,
            bytes_per_input=length * self.d_model * getattr(torch, dtype).itemsize,
            folder=self.model.cache_folder(str(self.cache_dir), self.cache_dtype),
            noun=self.noun,
            there=lambda: min(self._kept_of(training), needs.inputs),
        )
        needs.require_room(self.cache_limit_gb, may_halve=dtype == "float32")
        return needs

    def fill_cache(self, batches: int | None = None) -> CacheNeeds:
        """Keep all that a run reads, with a progress bar; what is there is not computed again.

        Args:
            batches: Those that the run trains on. None: as many as read everything once.

        Returns:
            What was asked for; where inputs are the same, or there are fewer, less is kept.

        Raises:
            UsageError: If data without a length have no number of batches, or there is no room.
        """
        needs = self.cache_needs(batches)
        if needs is None:
            raise UsageError(f"{self.source} has no length: say of how many steps (max_steps)")
        parts = itertools.chain(
            zip(self._held_out_parts(), itertools.repeat(self.read_held_out)),
            zip(self._training_parts(needs.training, 0), itertools.repeat(self.read)),
        )
        cache = self._activation_cache
        with tqdm(total=needs.inputs, desc="Keeping", unit=f" {self.noun}") as bar:
            try:
                for part, read in parts:
                    if not (self._reads_inputs_as_they_are and cache.holds(part)):
                        read(part)
                    bar.update(len(part))
            finally:  # whatever ends it
                self.model.write_caches()
        return needs

    def teardown(self, stage: str) -> None:
        """Write what is to be kept and is in no file yet."""
        self.model.write_caches()

    @property
    def cache_settings(self) -> tuple[str | None, Dtype | None, float]:
        """Where activations are kept, what they are rounded to, and the gigabytes they may take."""
        return self.cache_dir, self.cache_dtype, self.cache_limit_gb

    @property
    def inputs_at_once(self) -> int:
        """Inputs of one forward pass of the model."""
        return self.model_batch_size

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        return self.model.name

    @property
    def sites(self) -> dict[str, int]:
        """The widths of the sites that are read by their names, `layer_2_mlp_out` say."""
        return self.model.sites

    @property
    def d_model(self) -> int:
        """Width of the activations, of all sites together, known without loading any weights.

        Raises:
            UsageError: If there is no such model, or it has no such layer.
        """
        return self.model.d_model

    @property
    def description(self) -> dict[str, Any]:
        """What an activation is: the model by its name and its weights, the layer and the dtype.

        Where a cache rounds it, what to.
        """
        rounds = self.cache_dir is not None and self.cache_dtype is not None
        return self.model.description | ({"rounded_to": self.cache_dtype} if rounds else {})

    def describe(self) -> dict[str, Any]:
        """Return what activations these are, as JSON has it: for the record of what learns them."""
        names = self.model.names_elsewhere
        if names["hook_name"] is None and self.cache_dir is not None:  # no model was needed
            names["hook_name"] = self._activation_cache.shards.made_of.get("hook_name")
        return super().describe() | names

    @property
    def residual_stream(self) -> ResidualStream | SeveralSites:
        """The layer or sites of the frozen model, on the trainer's device; loaded at first use."""
        return self.model.residual_stream(self._device)

    @property
    def _activation_cache(self) -> ActivationCache:
        return self.model.cache(self._device, str(self.cache_dir), *self.cache_settings[1:])

    def _held_out_parts(self) -> Iterator[Tensor]:
        """Yield what is held out as it is read."""
        loaders = {"validation": self.val_dataloader, "test": self.test_dataloader}
        for stage, make in loaders.items():
            if self._held_out_inputs[stage]:
                yield from make().parts()

    def _training_parts(self, count: int, first: int) -> Iterator[Tensor]:
        """Yield the blocks of so many inputs, from `first` on, as they are read."""
        blocks = StreamDataModule.train_dataloader(self).blocks(first)
        for block in itertools.islice(blocks, math.ceil(count / self.inputs_per_block)):
            yield from block.split(self.inputs_at_once)

    def _kept_of(self, training: int) -> int:
        """Return how many inputs of a run are in the cache: at most, where that takes reading."""
        if not (self._reads_inputs_as_they_are and hasattr(self._train_inputs, "__len__")):
            return len(self._activation_cache.shards)
        first, _ = self._start()
        parts = itertools.chain(self._held_out_parts(), self._training_parts(training, first))
        cache = self._activation_cache
        return sum(cache.holds(each[None]) for part in parts for each in part)

    @property
    def _reads_inputs_as_they_are(self) -> bool:
        # Else what a subclass makes of them is what the model and its cache are given.
        return type(self).read is FrozenModelDataModule.read

    @property
    def _what_is_read(self) -> str:
        return str(self.model)

    @property
    def _may_read_ahead(self) -> bool:
        # While a bfloat16 model is loaded, which with a cache may be at any time, the default
        # dtype of all threads is bfloat16.
        loaded_first = self.cache_dir is None or self.model.dtype == "float32"
        return loaded_first and super()._may_read_ahead
