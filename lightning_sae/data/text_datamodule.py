"""The data module for text: batches of a language model's activations."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from lightning_sae.checks import require_at_least, require_positive
from lightning_sae.data.blocks import Inputs
from lightning_sae.data.contexts import PackedContexts, StreamedContexts
from lightning_sae.data.frozen_model import Dtype
from lightning_sae.data.frozen_model_datamodule import FrozenModelDataModule
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.packer import Packer
from lightning_sae.data.text import load_documents
from lightning_sae.sites import Layers, Sites

__all__ = ["ActivationDataModule"]


class ActivationDataModule(FrozenModelDataModule):
    """Activations of a language model at a layer, or at several: endless, shuffled, resumable.

    Training batches are tensors (tokens, d_model), float32: `batch_size` tokens over all devices.
    The stream never ends (give the Trainer `max_steps`) and is a function of the arguments
    alone: it does not depend on the number of devices, a fit starts at its beginning, and one that
    is resumed from a checkpoint goes on bit for bit where it was. Validation, test and prediction
    batches are `HeldOutBatch` dictionaries of text that is never trained on.

    Documents are joined by the tokenizer's EOS token and cut into contexts that start with its
    BOS token (each stands in for the other where there is only one). Special tokens and the
    first position of a context are read by the language model but never trained or measured on.

    Args:
        model_name: Language model to read: a Hugging Face hub id, a folder, or "quickstart", the
            small one in this package.
        layer: Block whose output is read, from 0, or the path of a module, as in
            `model.named_modules()`. A list: several, whose activations are beside each other.
        site: What of the block is read: the residual stream after it, or another of
            `lightning_sae.sites.Site`. A list: several, each of each layer.
        model_revision: Branch, tag or commit of the model on the hub.
        text: Text to read it on: a Hugging Face hub data set, a .txt, .json, .jsonl or .parquet
            file, compressed or not, a folder of such, or "quickstart", the sample in this package.
            In .txt files, blank lines separate documents.
        text_config: Configuration of the data set, where it has several.
        text_column: Column that holds the documents.
        train_split: Split to train on.
        validation_split: Split to validate and test on. None: the one called "validation" if
            there is one; otherwise documents are held out of the training split.
        held_out_documents: Documents to hold out of the training split where nothing else is
            there to validate on: random ones, or the first ones if streaming.
        streaming: Read text as it is needed, in its order, instead of downloading, tokenizing
            and shuffling all of it first. A resumed run goes on reading where it was.
        context_length: Tokens the language model sees at once.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        model_batch_size: Contexts of one forward pass of the language model.
        model_dtype: What the language model computes in.
        validation_tokens: Tokens of held-out text to validate on, in whole contexts.
        test_tokens: Tokens of held-out text to test on: those that come after.
        cache_dir: Folder to keep activations in; runs that need the same ones then do not
            compute them, nor load the language model. None: keep none.
        cache_dtype: What they are rounded to, for all that is trained and measured on, whether it
            was kept before or not: float16 takes half the space of float32. None: as they are.
        cache_limit_gb: Gigabytes that they may take. A run that would keep more is refused before
            it begins, where its length is known; any other keeps no more from there on.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range. Models and text that cannot be read are
            noticed when first needed.
    """

    noun: ClassVar[str] = "contexts"
    place: ClassVar[tuple[str, ...]] = (
        *FrozenModelDataModule.place,
        *("text", "text_config", "text_column", "train_split", "validation_split"),
        *("held_out_documents", "streaming", "context_length"),
    )
    positions: ClassVar[str] = "all but special tokens and the first of a context, which is BOS"
    model: LanguageModel

    def __init__(
        self,
        model_name: str = "quickstart",
        layer: Layers = 2,
        *,
        site: Sites = "resid_post",
        model_revision: str | None = None,
        text: str = "quickstart",
        text_config: str | None = None,
        text_column: str = "text",
        train_split: str = "train",
        validation_split: str | None = None,
        held_out_documents: int = 1000,
        streaming: bool = False,
        context_length: int = 128,
        batch_size: int = 4096,
        batches_per_block: int = 32,
        model_batch_size: int = 32,
        model_dtype: Dtype = "float32",
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        cache_dir: str | None = None,
        cache_dtype: Dtype | None = None,
        cache_limit_gb: float = 100,
        seed: int = 0,
    ) -> None:
        require_positive(held_out_documents=held_out_documents)
        require_at_least(2, context_length=context_length)
        require_at_least(
            context_length, validation_tokens=validation_tokens, test_tokens=test_tokens
        )
        super().__init__(
            LanguageModel(model_name, layer, site=site, revision=model_revision, dtype=model_dtype),
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            model_batch_size=model_batch_size,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            cache_dir=cache_dir,
            cache_dtype=cache_dtype,
            cache_limit_gb=cache_limit_gb,
            seed=seed,
        )
        self.save_hyperparameters()
        self.text = str(text)  # a `Path` will do
        self.source = f"text={self.text!r}"
        self.text_config = text_config
        self.text_column = text_column
        self.train_split = train_split
        self.validation_split = validation_split
        self.held_out_documents = held_out_documents
        self.streaming = streaming
        self.context_length = context_length

    @property
    def positions_per_input(self) -> int:
        """Tokens of a context, the special ones included."""
        return self.context_length

    @property
    def tokens_per_input(self) -> int:
        """All tokens of a context but the first, if none of the others is special."""
        return self.context_length - 1

    def kept(self, inputs: Tensor) -> Tensor:
        """Return which tokens are neither special nor the first: a bool mask, as the contexts."""
        return self._packer.kept(inputs)

    def describe(self) -> dict[str, Any]:
        """Return also the ids of the special tokens, which what learns from these never sees."""
        return super().describe() | {"special_tokens": self._packer.special}

    def train_inputs(self) -> Inputs:
        """Return the contexts of the documents to train on; without `streaming`, packs them all."""
        packer = self._packer  # first, to find a mistake in it before reading the text
        documents = self._documents[0]
        if self.streaming:
            return StreamedContexts(documents, self.text_column, packer)
        return PackedContexts(packer.pack_all(documents, self.text_column))

    def held_out_inputs(self) -> Inputs:
        """Return the contexts of the held-out documents; packs no more of them than are needed."""
        return StreamedContexts(self._documents[1], self.text_column, self._packer)

    @cached_property
    def _packer(self) -> Packer:
        return Packer(self.model.tokenizer(self.context_length), self.context_length)

    @cached_property
    def _documents(self) -> tuple[Any, Any]:
        """Documents to train on and held-out documents."""
        return load_documents(
            self.text,
            text_config=self.text_config,
            text_column=self.text_column,
            train_split=self.train_split,
            validation_split=self.validation_split,
            held_out_documents=self.held_out_documents,
            streaming=self.streaming,
            seed=self.seed,
        )
