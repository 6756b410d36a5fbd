"""Inputs in order: endless blocks to train on, and the first few to hold out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.modality import TEXT, Modality
from lightning_sae.data.packer import Packer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray

__all__ = [
    "Contexts",
    "ShuffledContexts",
    "ShuffledRows",
    "StreamedContexts",
    "held_out_contexts",
    "held_out_parts",
    "train_contexts",
]


class Contexts(Protocol):
    """An endless sequence of inputs, epoch after epoch."""

    def blocks(self, size: int, minimum: int, first: int) -> Iterator[Tensor]:
        """Yields block `first` and all that follow, without end.

        Block b is the inputs [b * size, (b + 1) * size) of the sequence.

        Args:
            size: Inputs of a block.
            minimum: Inputs that an epoch should have.
            first: The block to start at.

        Yields:
            Token ids, (size, context_length), or numbers of images, (size).

        Raises:
            ValueError: An epoch has fewer inputs than `minimum`.
        """


@dataclass(frozen=True)
class ShuffledRows:
    """The numbers of a data set's rows, each epoch in an order drawn from (seed, epoch).

    Args:
        total: Rows of the data set.
        seed: Seed of the order.
        name: What the data set is called, for error messages.
        modality: What it holds.
    """

    total: int
    seed: int
    name: str
    modality: Modality

    def blocks(self, size: int, minimum: int, first: int) -> Iterator[Tensor]:
        """Yields the blocks; see `Contexts.blocks`."""
        _check_enough(self.total, minimum, self.name, self.modality)

        @functools.lru_cache(maxsize=2)  # a block may straddle two epochs
        def order(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng((self.seed, 0, epoch)).permutation(self.total)

        for block in itertools.count(first):
            epochs, places = np.divmod(np.arange(block * size, (block + 1) * size), self.total)
            rows = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
            yield torch.from_numpy(np.concatenate(rows))


@dataclass(frozen=True)
class ShuffledContexts:
    """The contexts of a packed data set, each epoch in an order drawn from (seed, epoch).

    Args:
        packed: Contexts in the column `input_ids`, as `Packer.pack_all` returns them.
        seed: Seed of the order.
        text: What the text is called, for error messages.
    """

    packed: Dataset
    seed: int
    text: str

    def blocks(self, size: int, minimum: int, first: int) -> Iterator[Tensor]:
        """Yields the blocks; see `Contexts.blocks`."""
        rows = ShuffledRows(len(self.packed), self.seed, self.text, TEXT)
        for numbers in rows.blocks(size, minimum, first):
            yield torch.from_numpy(self.packed[numbers.numpy()]["input_ids"]).long()


@dataclass(frozen=True)
class StreamedContexts:
    """The contexts of documents in their order; nothing is kept, and skipping reads all before.

    Args:
        documents: Documents.
        column: Their column of text.
        packer: Packs them into contexts.
        text: What the text is called, for error messages.
    """

    documents: IterableDataset
    column: str
    packer: Packer
    text: str

    def blocks(self, size: int, minimum: int, first: int) -> Iterator[Tensor]:
        """Yields the blocks; see `Contexts.blocks`."""
        contexts = itertools.islice(self._endless(minimum), first * size, None)
        while True:
            block = np.stack(list(itertools.islice(contexts, size)))
            yield torch.from_numpy(block).long()

    def _endless(self, minimum: int) -> Iterator[NDArray[np.int32]]:
        while True:
            total = 0
            for context in self.packer.pack_lazily(self.documents, self.column):
                total += 1
                yield context
            _check_enough(total, minimum, self.text, TEXT)


def train_contexts(
    documents: Dataset | IterableDataset, column: str, packer: Packer, *, text: str, seed: int
) -> Contexts:
    """Returns the contexts to train on: shuffled, or streamed from documents without a length.

    Args:
        documents: Documents; those with a length are all packed now.
        column: Their column of text.
        packer: Packs them into contexts.
        text: What the text is called, for error messages.
        seed: Seed of the order.
    """
    if hasattr(documents, "__len__"):
        return ShuffledContexts(packer.pack_all(documents, column), seed, text)
    return StreamedContexts(documents, column, packer, text)


def held_out_contexts(
    documents: Dataset | IterableDataset,
    column: str,
    packer: Packer,
    *,
    text: str,
    validation: int,
    test: int,
) -> dict[str, Tensor]:
    """Packs just enough documents to validate and to test on, and says so if they are too few.

    Args:
        documents: Documents.
        column: Their column of text.
        packer: Packs them into contexts.
        text: What the text is called, for the message.
        validation: Contexts to validate on: the first ones.
        test: Contexts to test on: those that follow.

    Returns:
        Token ids of "validation" and "test", (contexts, context_length) each.
    """
    first = list(itertools.islice(packer.pack_lazily(documents, column), validation + test))
    contexts = torch.from_numpy(np.array(first, dtype=np.int64).reshape(-1, packer.context_length))
    return held_out_parts(contexts, TEXT, text, validation=validation, test=test)


def held_out_parts(
    inputs: Tensor, modality: Modality, name: str, *, validation: int, test: int
) -> dict[str, Tensor]:
    """Shares out held-out inputs, and says so if they are too few.

    Args:
        inputs: As many as are needed, or all there are, (inputs, ...).
        modality: What they are.
        name: What their data set is called, for the message.
        validation: Inputs to validate on: the first ones.
        test: Inputs to test on: those that follow.

    Returns:
        The inputs of "validation" and "test".
    """
    parts = {"validation": inputs[:validation], "test": inputs[validation : validation + test]}
    if len(inputs) < validation + test:
        rank_zero_info(
            f"{modality.argument}={name!r} has {len(inputs)} held-out {modality.inputs}: "
            f"{len(parts['validation'])} of {validation} to validate on, "
            f"{len(parts['test'])} of {test} to test on"
        )
    return parts


def _check_enough(total: int, minimum: int, name: str, modality: Modality) -> None:
    if total < minimum:
        raise UsageError(
            f"{modality.argument}={name!r} gives only {total} {modality.inputs} to train on; "
            f"one batch needs {minimum}"
        )
