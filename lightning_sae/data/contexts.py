"""Documents as the contexts they are packed into: all packed beforehand, or as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sae.data.packer import Packer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["PackedContexts", "StreamedContexts"]


@dataclass(frozen=True)
class PackedContexts:
    """The contexts of a packed data set, by their numbers: token ids, (context_length) int64 each.

    Args:
        packed: Contexts in the column `input_ids`, as `Packer.pack_all` returns them.
    """

    packed: Dataset

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, number: int) -> Tensor:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Tensor]:
        return list(torch.from_numpy(self.packed[numbers]["input_ids"]).long())


@dataclass(frozen=True)
class StreamedContexts:
    """The contexts of documents in their order, token ids, (context_length) int64; none is kept.

    Args:
        documents: Documents.
        column: Their column of text.
        packer: Packs them into contexts.
    """

    documents: Dataset | IterableDataset
    column: str
    packer: Packer

    def __iter__(self) -> Iterator[Tensor]:
        for context in self.packer.pack_lazily(self.documents, self.column):
            yield torch.from_numpy(context).long()
