"""Data sets from the Hugging Face hub or local files: what to train on and what to hold out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sae.checks import UsageError
from lightning_sae.data.files import by_split, format_of, load_files, not_in_utf8

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Modality", "load_examples"]

NO_DATA: Final = {
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
}
"""Files that `datasets` never takes for data."""


@dataclass(frozen=True)
class Modality:
    """A kind of data: what it is called in arguments and messages, and the files it comes in.

    Attributes:
        argument: The argument that names the data set. That of its column begins with it.
        examples: The rows of a data set, as in the argument that says how many to hold out.
        builders: What `datasets` calls the format of a file, by the end of its name.
    """

    argument: str
    examples: str
    builders: Mapping[str, str]


def load_examples(
    modality: Modality,
    name: str,
    *,
    path: str,
    config: str | None,
    column: str,
    train_split: str,
    validation_split: str | None,
    held_out: int,
    streaming: bool,
    seed: int,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Open a data set as training and held-out examples, none of them in both.

    Args:
        modality: What it holds.
        name: What the user calls it, for error messages.
        path: A file, a folder or a hub data set.
        config: Configuration of the data set, where it has several.
        column: Column that holds the examples.
        train_split: Split to train on.
        validation_split: Split to hold out. None: the split "validation" if there is one;
            otherwise examples are taken out of the training split.
        held_out: How many: random ones, or the first ones if streaming.
        streaming: Read examples as they are needed instead of all of them first.
        seed: Seed of that choice.

    Returns:
        Training and held-out examples, each with `column` as its only column.

    Raises:
        UsageError: If the data set, split or column does not exist, or holds too few examples.
    """
    called = f"{modality.argument}={name!r}"
    splits = _load(modality, called, path, config, column, streaming)
    train = _split(splits, "train_split", train_split, called)
    if validation_split is None and "validation" in splits and train_split != "validation":
        validation_split = "validation"
    if validation_split == train_split:
        raise UsageError(
            f"validation_split={validation_split!r} is the split to train on; "
            f"leave it out to hold out some of its {modality.examples}"
        )
    if validation_split is not None:
        rest = _split(splits, "validation_split", validation_split, called)
        if not streaming:  # files come sorted by name: the first ones would be no fair sample
            rest = rest.shuffle(seed=seed)
    elif streaming:
        train, rest = train.skip(held_out), train.take(held_out)
    else:
        examples = len(train)
        if examples <= held_out:
            raise UsageError(
                f"held_out_{modality.examples}={held_out} leaves nothing to train on: "
                f"{called} has {examples} {modality.examples}"
            )
        random = np.random.default_rng((seed, 2))
        chosen = random.choice(examples, held_out, replace=False)
        # The rest stays in order: reading it in another would be slow.
        rest = train.select(chosen)
        train = train.select(np.delete(np.arange(examples), chosen))
    return _only(train, column, modality, called), _only(rest, column, modality, called)


def _load(
    modality: Modality, called: str, path: str, config: str | None, column: str, streaming: bool
) -> Any:
    from datasets import load_dataset
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.exceptions import DatasetsError

    where, files = _where(modality, called, path)
    local = None
    try:
        if isinstance(where, Path):
            local = _local(modality, called, where, config)
            if local is not None:
                return load_files(
                    local,
                    modality.builders,
                    column=column,
                    column_argument="_".join([modality.argument, "column"]),
                    called=called,
                    streaming=streaming,
                )
            files = _paragraphs(modality, where)
        return load_dataset(str(where), config, **files, streaming=streaming)
    except UsageError:
        raise
    except (DatasetsError, OSError, RuntimeError, StopIteration, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, SchemaInferenceError | StopIteration):  # what an empty file raises
            raise _nothing(modality, called) from error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        if isinstance(cause, UnicodeDecodeError) and isinstance(where, Path):
            every = itertools.chain(*local.values()) if local else sorted(where.rglob("*"))
            texts = (f for f in every if format_of(f, modality.builders) in ("text", "json"))
            reason = f"{not_in_utf8(texts)}: {reason}"
        raise UsageError(f"{called} cannot be read: {reason}") from error


def _where(modality: Modality, called: str, name: str) -> tuple[Path | str, dict[str, str]]:
    """Return where this name is: a path, or what to give `load_dataset`."""
    path = Path(name).expanduser().absolute()
    if path.exists():
        return path, {}
    if format_of(path, modality.builders) or name.startswith((".", "/", "~")):
        raise UsageError(f"{called} does not exist")
    return name, {}


def _local(
    modality: Modality, called: str, path: Path, config: str | None
) -> dict[str, list[Path]] | None:
    """Return the files to read of each split; None if `datasets` knows better what they are."""
    if path.is_file():
        if format_of(path, modality.builders) is None:
            raise UsageError(f"{called} should end in one of {', '.join(modality.builders)}")
        splits = {"train": [path]}
    else:
        if config is not None or _describes_itself(path, modality):
            return None
        found = sorted(file for file in path.rglob("*") if file.is_file() and _shown(file, path))
        files = [file for file in found if format_of(file, modality.builders)]
        if not files:
            return None
        left_out = [file for file in found if file not in set(files)]
        if left_out:
            rank_zero_info(
                f"{called} has {len(left_out)} files that are not read, among them "
                f"{left_out[0].relative_to(path)}"
            )
        splits = by_split(files, path, called)
    filled = {
        split: [file for file in files if file.stat().st_size] for split, files in splits.items()
    }
    if not any(filled.values()):
        raise _nothing(modality, called)
    return {split: files for split, files in filled.items() if files}


def _describes_itself(folder: Path, modality: Modality) -> bool:
    """Whether a folder says what its files are, as a copy of a data set of the hub may."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE):
        return True
    names = [folder / "state.json", folder / ".huggingface.yaml"]
    if "imagefolder" in modality.builders.values():
        names += folder.rglob("metadata.*")
    return any(name.exists() for name in names)


def _paragraphs(modality: Modality, path: Path) -> dict[str, str]:
    """Return the options of `load_dataset` for a folder that is left to it."""
    formats = {format_of(file, modality.builders) for file in path.rglob("*")} - {None}
    return {"sample_by": "paragraph"} if formats == {"text"} else {}


def _shown(file: Path, folder: Path) -> bool:
    place = file.relative_to(folder)
    return place.name not in NO_DATA and not any(p.startswith((".", "__")) for p in place.parts)


def _split(splits: Any, key: str, name: str, called: str) -> Any:
    if name not in splits:
        raise UsageError(f"{key}={name!r}: {called} has the splits {', '.join(splits)}")
    return splits[name]


def _only(examples: Any, column: str, modality: Modality, called: str) -> Any:
    # A streamed data set may not know its columns before its first example.
    try:
        columns = examples.column_names or list(next(iter(examples), {}))
    except (OSError, ValueError) as error:
        raise UsageError(f"{called} cannot be read: {str(error).splitlines()[0]}") from error
    if not columns or (hasattr(examples, "__len__") and len(examples) == 0):
        raise _nothing(modality, called)
    if column not in columns:
        raise UsageError(
            f"{modality.argument}_column={column!r}: {called} has the columns {', '.join(columns)}"
        )
    return examples.select_columns([column])


def _nothing(modality: Modality, called: str) -> UsageError:
    return UsageError(f"{called} has no {modality.examples}")
