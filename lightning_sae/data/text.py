"""Where documents come from: the Hugging Face hub, local files, or the packaged sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lightning_sae.quickstart import TEXT

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["load_documents"]

BUILDERS: Final = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
    """Opens a text data set as training and held-out documents, none of them in both.

    Args:
        text: "quickstart", a file, a folder or a hub data set. In `.txt` files a document is a
            paragraph: what stands between blank lines.
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
        ValueError: The text, split or column does not exist, or holds too few documents.
    """
    splits = _load(text, text_config, streaming=streaming)
    train = _split(splits, "train_split", train_split, text)
    if validation_split is None and "validation" in splits and train_split != "validation":
        validation_split = "validation"
    if validation_split == train_split:
        raise ValueError(
            f"validation_split={validation_split!r} is the split to train on; "
            "leave it out to hold out some of its documents"
        )
    if validation_split is not None:
        held_out = _split(splits, "validation_split", validation_split, text)
        if not streaming:  # files come sorted by name: the first ones would be no fair sample
            held_out = held_out.shuffle(seed=seed)
    elif streaming:
        train, held_out = train.skip(held_out_documents), train.take(held_out_documents)
    else:
        documents = len(train)
        if documents <= held_out_documents:
            raise ValueError(
                f"held_out_documents={held_out_documents} leaves nothing to train on: "
                f"text={text!r} has {documents} documents"
            )
        random = np.random.default_rng((seed, 2))
        chosen = random.choice(documents, held_out_documents, replace=False)
        # The rest stays in order: reading it in another would be slow.
        held_out = train.select(chosen)
        train = train.select(np.delete(np.arange(documents), chosen))
    return _only(train, text_column, text), _only(held_out, text_column, text)


def _load(text: str, text_config: str | None, *, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.exceptions import DatasetsError

    path, options = _source(text)
    try:
        return load_dataset(path, text_config, streaming=streaming, **options)
    except (DatasetsError, OSError, StopIteration, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, SchemaInferenceError | StopIteration):  # what an empty file raises
            raise _nothing(text) from error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ValueError(f"text={text!r} cannot be read: {reason}") from error


def _source(text: str) -> tuple[str, dict[str, str]]:
    """What to give `load_dataset` for this text: a path and further options."""
    path = (TEXT if text == "quickstart" else Path(text).expanduser()).absolute()
    paragraphs = {"sample_by": "paragraph"}
    if path.is_dir():
        suffixes = {file.suffix for file in path.rglob("*")} & set(BUILDERS)
        return str(path), paragraphs if suffixes == {".txt"} else {}
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"text={text!r} should end in one of {', '.join(BUILDERS)}")
        options = {"data_files": str(path)}
        return BUILDERS[path.suffix], options | (paragraphs if path.suffix == ".txt" else {})
    if path.suffix in BUILDERS or text.startswith((".", "/", "~")):
        raise ValueError(f"text={text!r} does not exist")
    return text, {}


def _split(splits: Any, key: str, name: str, text: str) -> Any:
    if name not in splits:
        raise ValueError(f"{key}={name!r}: text={text!r} has the splits {', '.join(splits)}")
    return splits[name]


def _only(documents: Any, text_column: str, text: str) -> Any:
    # A streamed data set may not know its columns before its first document.
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns or (hasattr(documents, "__len__") and len(documents) == 0):
        raise _nothing(text)
    if text_column not in columns:
        raise ValueError(
            f"text_column={text_column!r}: text={text!r} has the columns {', '.join(columns)}"
        )
    return documents.select_columns([text_column])


def _nothing(text: str) -> ValueError:
    return ValueError(f"text={text!r} has no documents")
