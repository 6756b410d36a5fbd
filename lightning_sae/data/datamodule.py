"""The data module for text: batches of a language model's activations."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, ClassVar, Final

from torch import Tensor

from lightning_sae.data.base import FrozenModelDataModule
from lightning_sae.data.contexts import Contexts, held_out_contexts, train_contexts
from lightning_sae.data.frozen_model import Dtype
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.modality import TEXT, Modality
from lightning_sae.data.packer import Packer
from lightning_sae.data.stream import Read
from lightning_sae.data.text import load_documents

__all__ = ["ActivationDataModule"]

SOURCE: Final = tuple(inspect.signature(load_documents).parameters)
"""The arguments that `load_documents` takes from the data module."""


class ActivationDataModule(FrozenModelDataModule):
    """Activations of one layer of a language model: endless, shuffled, resumable.

    Training batches are tensors (tokens, d_model), float32: `batch_size` tokens over all devices.
    The stream never ends (give the Trainer `max_steps`) and is a function of the arguments
    alone: it does not depend on the number of devices, and a run resumed from a checkpoint goes
    on bit for bit where it was. Validation, test and prediction batches are `HeldOutBatch`
    dictionaries of text that is never trained on.

    Documents are joined by the tokenizer's EOS token and cut into contexts that start with its
    BOS token (each stands in for the other where there is only one). Special tokens and the
    first position of a context are read by the language model but never trained or measured on.

    Args:
        model_name: Language model to read: a Hugging Face hub id, a folder, or "quickstart", the
            small one in this package.
        layer: Block whose output is read, from 0.
        model_revision: Branch, tag or commit of the model on the hub.
        text: Text to read it on: a Hugging Face hub data set, a .txt, .json, .jsonl or .parquet
            file, a folder of such, or "quickstart", the sample in this package. In .txt files,
            blank lines separate documents.
        text_config: Configuration of the data set, where it has several.
        text_column: Column that holds the documents.
        train_split: Split to train on.
        validation_split: Split to validate and test on. None: the one called "validation" if
            there is one; otherwise documents are held out of the training split.
        held_out_documents: Documents to hold out of the training split where nothing else is
            there to validate on: random ones, or the first ones if streaming.
        streaming: Read text as it is needed, in its order, instead of downloading, tokenizing
            and shuffling all of it first. Resuming then reads again what came before.
        context_length: Tokens the language model sees at once.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        lm_batch_size: Contexts of one forward pass of the language model.
        lm_dtype: What the language model computes in.
        validation_tokens: Tokens of held-out text to validate on, in whole contexts.
        test_tokens: Tokens of held-out text to test on: those that come after.
        cache_dir: Folder to keep activations in; runs that need the same ones then do not
            compute them, nor load the language model. None: keep none.
        seed: Seed of every choice and shuffle.

    Raises:
        ValueError: An argument is out of its range. Models and text that cannot be read are
            noticed when first needed.
    """

    modality: ClassVar[Modality] = TEXT
    place: ClassVar[tuple[str, ...]] = (
        *SOURCE,
        *("model_name", "context_length", "batch_size", "batches_per_block"),
    )

    def __init__(
        self,
        model_name: str = "quickstart",
        layer: int = 2,
        *,
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
        lm_batch_size: int = 32,
        lm_dtype: Dtype = "float32",
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            LanguageModel(model_name, layer, revision=model_revision, dtype=lm_dtype),
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            lm_batch_size=lm_batch_size,
            cache_dir=cache_dir,
            seed=seed,
        )
        self.save_hyperparameters()
        least = {"layer": 0, "held_out_documents": 1, "context_length": 2, "batch_size": 1}
        least |= {"batches_per_block": 1, "lm_batch_size": 1, "seed": 0}
        least |= {"validation_tokens": context_length, "test_tokens": context_length}
        self._check_at_least(least)
        self.context_length = context_length
        self._model: LanguageModel

    def _tokens_per_input(self) -> int:
        return self.context_length - 1

    def _kept(self, inputs: Tensor) -> Tensor:
        return self._packer.kept(inputs)

    def _train_inputs(self) -> tuple[Contexts, Read]:
        return self._train_contexts, self._model.reader(self._device, self.cache_dir)

    def _held_out_inputs(self, stage: str) -> tuple[Tensor, Read]:
        return self._held_out_contexts[stage], self._model.reader(self._device, self.cache_dir)

    @cached_property
    def _packer(self) -> Packer:
        return Packer(self._model.tokenizer(self.context_length), self.context_length)

    @cached_property
    def _documents(self) -> tuple[Any, Any]:
        """Documents to train on and held-out documents."""
        return load_documents(**{name: self.hparams[name] for name in SOURCE})

    @cached_property
    def _train_contexts(self) -> Contexts:
        packer = self._packer  # first, to find a mistake in it before reading the text
        text, column = self.hparams["text"], self.hparams["text_column"]
        return train_contexts(self._documents[0], column, packer, text=text, seed=self.seed)

    @cached_property
    def _held_out_contexts(self) -> dict[str, Tensor]:
        return held_out_contexts(
            self._documents[1],
            self.hparams["text_column"],
            self._packer,
            text=self.hparams["text"],
            validation=self.hparams["validation_tokens"] // self.context_length,
            test=self.hparams["test_tokens"] // self.context_length,
        )
