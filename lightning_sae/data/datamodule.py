"""The Lightning data module: text in, batches of a language model's activations out."""

from __future__ import annotations

import inspect
import math
from functools import cached_property, partial
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sae.data.contexts import Contexts, held_out_contexts, train_contexts
from lightning_sae.data.language_model import Dtype, LanguageModel
from lightning_sae.data.packer import Packer
from lightning_sae.data.stream import ActivationStream, Cursor, HeldOutBatches
from lightning_sae.data.text import load_documents
from lightning_sae.distributed import world_size
from lightning_sae.residual_stream import ResidualStream

__all__ = ["ActivationDataModule"]

TEXT: Final = tuple(inspect.signature(load_documents).parameters)
"""The arguments that `load_documents` takes from the data module."""

PLACE: Final = (*TEXT, "model_name", "context_length", "batch_size", "batches_per_block")
"""The arguments that decide which text a place in the stream stands for."""


class ActivationDataModule(pl.LightningDataModule):
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
        batches_per_block: Batches whose tokens are shuffled together, and held in memory.
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
        super().__init__()
        self.save_hyperparameters()
        self._check_arguments()
        self.context_length = context_length
        self.batch_size = batch_size  # the name that Lightning's batch size finder looks for
        self.batches_per_block = batches_per_block
        self.lm_batch_size = lm_batch_size
        self.cache_dir = cache_dir
        self.seed = seed
        self._cursor: Cursor = (0, 0)
        self._model = LanguageModel(model_name, layer, revision=model_revision, dtype=lm_dtype)

    @property
    def d_model(self) -> int:
        """Width of the residual stream, known without loading any weights.

        Raises:
            ValueError: There is no such model, or it has no such layer.
        """
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def residual_stream(self) -> ResidualStream:
        """The layer of the frozen language model, on the trainer's device; loaded at first use."""
        return self._model.residual_stream(self._device)

    def prepare_data(self) -> None:
        """Tokenizes the text to train on, once per machine; its other processes find it on disk."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            _ = self._train_contexts

    def train_dataloader(self) -> ActivationStream:
        """The endless stream of `TrainBatch` dictionaries, from where training was left.

        Raises:
            ValueError: The devices cannot share a batch equally.
        """
        ranks = world_size()
        if self.batch_size % ranks:
            raise ValueError(f"batch_size={self.batch_size} cannot be shared by {ranks} devices")
        tokens = self.context_length - 1  # of a context, to train on
        # A quarter of a batch makes up for special tokens; the rest of it is dropped.
        size = math.ceil((self.batches_per_block + 0.25) * self.batch_size / tokens)
        minimum = math.ceil(self.batch_size / tokens)
        return ActivationStream(
            blocks=partial(self._train_contexts.blocks, size, minimum),
            kept=self._packer.kept,
            read=self._model.reader(self._device, self.cache_dir),
            batch_size=self.batch_size,
            lm_batch_size=self.lm_batch_size,
            seed=self.seed,
            source=str(self._model),
            start=self._start,
        )

    def val_dataloader(self) -> HeldOutBatches:
        """`HeldOutBatch` dictionaries of the first `validation_tokens` of the held-out text."""
        return self._held_out_batches("validation")

    def test_dataloader(self) -> HeldOutBatches:
        """`HeldOutBatch` dictionaries of the next `test_tokens` of the held-out text."""
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
        return {"cursor": self._cursor, "place": {name: self.hparams[name] for name in PLACE}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues right after the batch that was consumed last when the state was saved."""
        block, batch = self._cursor = state_dict["cursor"]
        for name, before in state_dict["place"].items():
            if self.hparams[name] != before:
                rank_zero_warn(
                    f"{name}={self.hparams[name]!r} was {before!r} in the checkpoint: training "
                    f"continues at batch {batch} of block {block}, which is other text now"
                )

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _start(self) -> Cursor:
        # `Trainer(overfit_batches=n)` wants the same n batches in each epoch.
        return (0, 0) if getattr(self.trainer, "overfit_batches", 0) else self._cursor

    @cached_property
    def _packer(self) -> Packer:
        return Packer(self._model.tokenizer(self.context_length), self.context_length)

    @cached_property
    def _documents(self) -> tuple[Any, Any]:
        """Documents to train on and held-out documents."""
        return load_documents(**{name: self.hparams[name] for name in TEXT})

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

    def _held_out_batches(self, stage: str) -> HeldOutBatches:
        contexts, ranks = self._held_out_contexts[stage], world_size()
        if len(contexts) < ranks:
            raise ValueError(
                f"{stage}_tokens={self.hparams[f'{stage}_tokens']}: text={self.hparams['text']!r} "
                f"has {len(contexts)} held-out contexts for it, {ranks} devices need one each"
            )
        return HeldOutBatches(
            contexts=contexts,
            kept=self._packer.kept,
            read=self._model.reader(self._device, self.cache_dir),
            lm_batch_size=self.lm_batch_size,
            source=str(self._model),
        )

    def _check_arguments(self) -> None:
        least = {"layer": 0, "held_out_documents": 1, "context_length": 2, "batch_size": 1}
        least |= {"batches_per_block": 1, "lm_batch_size": 1, "seed": 0}
        least |= dict.fromkeys(("validation_tokens", "test_tokens"), self.hparams["context_length"])
        for name, value in least.items():
            if self.hparams[name] < value:
                raise ValueError(f"{name}={self.hparams[name]} should be at least {value}")
