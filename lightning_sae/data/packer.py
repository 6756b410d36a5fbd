"""Documents to contexts: token sequences of one length."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sae.checks import UsageError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["Packer"]

DOCUMENTS_AT_ONCE: Final = 1000


class Packer:
    """Packs documents into contexts, and tells which of their tokens count.

    Documents are joined with the tokenizer's EOS token (BOS if it has no EOS), and each context
    starts with its BOS token (EOS if it has no BOS); a document may go on in the next context.
    Special tokens are never trained or measured on, nor is the first position of a context,
    where models park attention and the norm is many times the others'. A tokenizer with neither
    token joins documents with nothing, and the first position is left out all the same.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens of a context, the special ones included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = int(context_length)  # which becomes part of a file's description
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.start = [token for token in (bos, eos) if token is not None][:1]
        self.separator = [token for token in (eos, bos) if token is not None][:1]
        added = tokenizer.added_tokens_decoder.items()
        self.special = sorted({i for i, t in added if t.special} | {*tokenizer.all_special_ids})

    def pack(self, documents: Sequence[Any]) -> NDArray[np.int32]:
        """Pack documents; what is left over below one context is dropped.

        Args:
            documents: Strings. None among them is left out.

        Returns:
            Token ids, (contexts, context_length).

        Raises:
            UsageError: If a document is something else.
        """
        return _PackOnward(self)(documents, range(len(documents)))["input_ids"]

    def kept(self, input_ids: Tensor) -> Tensor:
        """Return which positions are trained and measured on: a bool mask, (contexts, length)."""
        special = torch.tensor(self.special, dtype=input_ids.dtype, device=input_ids.device)
        kept = ~torch.isin(input_ids, special)
        kept[:, 0] = False
        return kept

    def pack_all(self, documents: Dataset, column: str) -> Dataset:
        """Pack a whole data set, once: `datasets` keeps the result on disk.

        Returns:
            A data set with one column, `input_ids`, of (context_length) each.
        """
        from datasets import Features, List, Value

        return documents.map(
            _PackOnward(self),
            batched=True,
            batch_size=DOCUMENTS_AT_ONCE,
            with_indices=True,
            input_columns=[column],
            remove_columns=[column],
            features=Features({"input_ids": List(Value("int32"), length=self.context_length)}),
            desc="Tokenizing",
        ).with_format("numpy")

    def pack_lazily(
        self, documents: Dataset | IterableDataset, column: str
    ) -> Iterator[NDArray[np.int32]]:
        """Yield the contexts of a data set in its order, (context_length) each."""
        for contexts, _ in self.pack_onward(documents, column):
            yield from contexts

    def pack_onward(
        self,
        documents: Dataset | IterableDataset,
        column: str,
        place: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[NDArray[np.int32], Mapping[str, Any]]]:
        """Yield the contexts of some documents at a time, and the place at which these begin.

        Args:
            documents: An `IterableDataset` if its places are to be used.
            column: Column that holds the texts.
            place: One of these documents, to go on from. None: their beginning.

        Yields:
            Contexts, (contexts, context_length), and a place, as JSON has it.
        """
        place = place or {"documents": None, "number": 0, "left": []}
        if place["documents"] is not None:
            documents.load_state_dict(place["documents"])
        pack = _PackOnward(self)
        pack.left = list(place["left"])
        for batch in _read(documents, place["number"]):
            texts, number = batch[column], place["number"]
            yield pack(texts, range(number, number + len(texts)))["input_ids"], place
            state = documents.state_dict() if hasattr(documents, "state_dict") else None
            place = {"documents": state, "number": number + len(texts), "left": pack.left}


def _read(documents: Dataset | IterableDataset, first: int) -> Iterator[dict[str, Any]]:
    """Yield batches of documents; what reading them raises is about the text.

    Args:
        documents: Those to read.
        first: The number of the first of them.

    Raises:
        UsageError: If they cannot be read to their end.
    """
    batches = documents.iter(batch_size=DOCUMENTS_AT_ONCE)
    for number in itertools.count():
        try:
            batch = next(batches, None)
        except UsageError:
            raise
        except Exception as error:  # there is no end to what files and networks raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            place = first + number * DOCUMENTS_AT_ONCE
            raise UsageError(f"text cannot be read after document {place}: {reason}") from error
        if batch is None:
            return
        yield batch


class _PackOnward:
    """Packs documents that come in batches; what is left below one context goes into the next.

    `datasets` tells cached results apart by this class's name and attributes, not by what it does:
    rename it when the packing changes.
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.left: list[int] = []  # token ids
        self.told = False  # of documents without a text

    def __call__(
        self, documents: Sequence[Any], numbers: Sequence[int]
    ) -> dict[str, NDArray[np.int32]]:
        """Return the contexts that are complete now, as `input_ids`.

        Args:
            documents: Those of a batch.
            numbers: Their places among all, for messages.
        """
        packer = self.packer
        texts = self._texts(documents, numbers)
        encoded = (
            texts
            and packer.tokenizer(  # which cannot be given none
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        )
        joined = itertools.chain.from_iterable(
            itertools.chain(ids, packer.separator) for ids in encoded
        )
        tokens = np.fromiter(itertools.chain(self.left, joined), dtype=np.int32)
        body = packer.context_length - len(packer.start)
        complete = len(tokens) // body * body
        self.left = tokens[complete:].tolist()
        bodies = tokens[:complete].reshape(-1, body)
        first = np.full((len(bodies), len(packer.start)), packer.start, dtype=np.int32)
        return {"input_ids": np.concatenate([first, bodies], axis=1)}

    def _texts(self, documents: Sequence[Any], numbers: Sequence[int]) -> list[str]:
        texts = []
        for document, number in zip(documents, numbers, strict=True):
            if isinstance(document, str):
                texts.append(document)
            elif document is not None:
                held = reprlib.repr(document)  # one short line, whatever it is
                raise UsageError(
                    f"text_column holds {held}, which is not a string, at document {number}"
                )
            elif not self.told:
                self.told = True
                rank_zero_info(
                    f"text_column holds nothing at document {number}: it is left out, and so are "
                    "all others like it"
                )
        return texts
