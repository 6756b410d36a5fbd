"""Documents as the contexts they are packed into: all packed beforehand, or as they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


class StreamedContexts:
    """The contexts of documents in their order, token ids, (context_length) int64; none is kept.

    Args:
        documents: Documents.
        column: Their column of text.
        packer: Packs them into contexts.
    """

    def __init__(self, documents: Dataset | IterableDataset, column: str, packer: Packer) -> None:
        self.documents = documents
        self.column = column
        self.packer = packer
        self._begin: Mapping[str, Any] | None = None
        self._reached: tuple[Mapping[str, Any], int] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        begin, self._begin = self._begin, None
        documents = self.documents
        if hasattr(documents, "state_dict"):
            # Data sets that are streamed share their state with those that are made of them: the
            # documents that are held out, say, which are read meanwhile.
            documents = copy.deepcopy(documents)
        taken = 0 if begin is None else begin["taken"]
        for contexts, place in self.packer.pack_onward(documents, self.column, begin):
            for number in range(taken, len(contexts)):
                self._reached = place, number + 1
                yield torch.from_numpy(contexts[number]).long()
            taken = 0

    def state_dict(self) -> dict[str, Any] | None:
        """Return the place after the context that was read last; None if documents have none.

        It is that of some documents, as `datasets` notes it, and how many contexts of theirs were
        read: to go on there is to read and pack these once more, and none that came before.
        """
        if self._reached is None or not hasattr(self.documents, "state_dict"):
            return None
        place, taken = self._reached
        return {**place, "taken": taken}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a place the next time; all later times begin at the beginning."""
        self._begin = state_dict
