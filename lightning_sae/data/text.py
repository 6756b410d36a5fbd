"""Where documents come from: the Hugging Face hub, local files, or the packaged sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lightning_sae.checks import UsageError
from lightning_sae.data.examples import Modality, load_examples
from lightning_sae.quickstart import TEXT as QUICKSTART

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["load_documents"]

TEXT: Final = Modality(
    argument="text",
    examples="documents",
    builders={".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"},
)


def load_documents(
    text: str,
    *,
    text_config: str | None,
    text_column: str,
    train_split: str,
    validation_split: str | None,
    held_out_documents: int,
    streaming: bool,
    seed: int,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Open a text data set as training and held-out documents, none of them in both.

    Args:
        text: "quickstart", a file, a folder or a hub data set. In `.txt` files a document is a
            paragraph: what stands between blank lines. Files may be compressed.
        text_config: Configuration of the data set, where it has several.
        text_column: Column that holds the documents.
        train_split: Split to train on.
        validation_split: Split to hold out. None: the split "validation" if there is one;
            otherwise documents are taken out of the training split.
        held_out_documents: How many: random ones, or the first ones if streaming.
        streaming: Read documents as they are needed instead of all of them first.
        seed: Seed of that choice.

    Returns:
        Training and held-out documents, each with `text_column` as its only column.

    Raises:
        UsageError: If the text, split or column does not exist, or holds too few documents.
    """
    if not text:  # else it is the folder we are in
        raise UsageError("text='' is no data set")
    return load_examples(
        TEXT,
        text,
        path=str(QUICKSTART) if text == "quickstart" else text,
        config=text_config,
        column=text_column,
        train_split=train_split,
        validation_split=validation_split,
        held_out=held_out_documents,
        streaming=streaming,
        seed=seed,
    )
