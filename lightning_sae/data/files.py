"""Local files as a data set: which split each belongs to, and how its examples are read."""

from __future__ import annotations

import glob
import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sae.checks import UsageError

__all__ = ["by_split", "format_of", "load_files", "not_in_utf8"]

COMPRESSIONS: Final = (".gz", ".bz2", ".lz4", ".xz", ".zip", ".zst")
"""Endings of the compressed files that `datasets` opens."""
SPLITS: Final[Mapping[str, Sequence[str]]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in names of files and folders that `datasets` takes for those of splits."""
LINES: Final = "lines"


def format_of(file: Path, formats: Mapping[str, str]) -> str | None:
    """Return what `datasets` calls the format of a file; None if it is none of these.

    Args:
        file: Its name may end in that of a compression.
        formats: Formats by the ends of file names.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return formats.get(suffixes[-1]) if suffixes else None


def by_split(files: Sequence[Path], folder: Path, called: str) -> dict[str, list[Path]]:
    """Share out all files of a folder among splits, by their names.

    Where the name of each says a split, as `datasets` reads names (a folder comes before what is in
    it), they are those splits. Elsewhere a word may stand in a name by chance: only files and
    folders that are called like a split, and no more, belong to one, and all others to "train".

    Args:
        files: Those to read.
        folder: Where they are.
        called: What messages call it: the argument that names it, and its value.
    """
    places = [file.relative_to(folder) for file in files]
    names = [_split_named(place, exactly=False) for place in places]
    by_chance = None in names
    if by_chance:
        names = [_split_named(place, exactly=True) or "train" for place in places]
    splits: dict[str, list[Path]] = defaultdict(list)
    for name, file in zip(names, files, strict=True):
        splits[str(name)].append(file)
    if by_chance and len(splits) > 1:
        counts = ", ".join(f"{len(of_split)} of {name!r}" for name, of_split in splits.items())
        rank_zero_info(f"{called} has files of several splits: {counts}")
    return splits


def load_files(
    splits: Mapping[str, Sequence[Path]],
    formats: Mapping[str, str],
    *,
    column: str,
    column_argument: str,
    called: str,
    streaming: bool,
) -> dict[str, Any]:
    """Open files as data sets, one a split, of which nothing but one column is read.

    A document of a `.txt` file is a paragraph: what stands between blank lines.

    Args:
        splits: The files of each, none of them empty.
        formats: Formats by the ends of file names.
        column: The column.
        column_argument: The argument that names it.
        called: What messages call the files: the argument that names them, and its value.
        streaming: Read them as they are needed.

    Returns:
        A `Dataset`, or an `IterableDataset`, for each split.

    Raises:
        UsageError: If no file has the column.
    """
    from datasets import concatenate_datasets

    looks = {
        file: _look_into(file, str(format_of(file, formats)), column)
        for files in splits.values()
        for file in files
    }
    columns = dict.fromkeys(name for _, names in looks.values() for name in names)
    if column not in columns:
        raise UsageError(
            f"{column_argument}={column!r}: {called} has the columns {', '.join(columns)}"
        )
    opened = {}
    for split, files in splits.items():
        groups: dict[str, list[Path]] = defaultdict(list)
        for number, file in enumerate(files):
            kind = looks[file][0]
            groups[f"{kind} {number}" if kind == "json" else kind].append(file)
        parts = [
            _read(name.split()[0], of_kind, column, column_argument, streaming)
            for name, of_kind in groups.items()
        ]
        opened[split] = concatenate_datasets(parts)
    return opened


def not_in_utf8(files: Iterable[Path]) -> Path | None:
    """Return the first of these text files, compressed or not, that is in another encoding."""
    import fsspec  # which `datasets` opens files with

    for file in files:
        try:
            with fsspec.open(str(file), "rt", encoding="utf-8", compression="infer") as content:
                while content.read(2**20):
                    pass
        except UnicodeDecodeError:
            return file
    return None


def _split_named(place: Path, *, exactly: bool) -> str | None:
    """Return the split that a file's place in its folder names, if any."""
    shard = re.fullmatch(r"data/(\w+(\.\w+)*)-\d{5}-of-\d{5}.*", place.as_posix())
    if shard is not None:  # as data sets of the hub are stored
        return shard[1]
    stem = place.with_suffix("") if place.suffix in COMPRESSIONS else place
    for part in stem.with_suffix("").parts:
        words = [word for word in re.split(r"[-._ 0-9]+", part) if word]
        for split, its_words in SPLITS.items():
            if exactly and words and words[0] in its_words and words[1:] in ([], ["of"]):
                return split
            if not exactly and set(words) & set(its_words):
                return split
    return None


def _look_into(file: Path, of_format: str, column: str) -> tuple[str, list[str]]:
    """Return how to read a file, and its columns: the format, or LINES if it is JSON in lines."""
    if of_format == "parquet":
        from pyarrow import parquet

        return of_format, list(parquet.read_schema(file).names)
    if of_format != "json":
        return of_format, ["text" if of_format == "text" else "image"]
    import fsspec  # which `datasets` opens files with

    found: dict[str, None] = {}  # the names, in their order
    with fsspec.open(str(file), "rt", encoding="utf-8-sig", compression="infer") as content:
        for line in content:
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                # Of what is no line of an object in the middle of others, the place is told later.
                return (LINES, [column]) if found else ("json", [column])
            found |= dict.fromkeys(record)
            if column in found:  # often in the first
                break
    return (LINES, list(found)) if found else ("json", [column])


def _read(
    kind: str, files: Sequence[Path], column: str, column_argument: str, streaming: bool
) -> Any:
    from datasets import Features, Value, load_dataset

    one_column = Features({column: Value("string")})
    options: dict[str, dict[str, Any]] = {
        "text": {"sample_by": "paragraph", "encoding": "utf-8-sig", "features": one_column},
        LINES: {"sample_by": "line", "encoding": "utf-8-sig"},
        "json": {},
        "parquet": {"columns": [column]},
        "imagefolder": {"drop_labels": True},
    }
    rows = load_dataset(
        "text" if kind == LINES else kind,
        data_files={"train": [glob.escape(str(file)) for file in files]},
        split="train",
        streaming=streaming,
        **options[kind],
    )
    if kind == LINES:
        return rows.map(
            _column_of_lines,
            batched=True,
            with_indices=True,
            remove_columns=["text"],
            features=one_column,
            fn_kwargs={"column": column, "column_argument": column_argument},
        )
    if column not in (rows.column_names or [column]):  # what is streamed may not know yet
        raise UsageError(
            f"{column_argument}={column!r}: {files[0]} has the columns "
            f"{', '.join(rows.column_names)}"
        )
    return rows.select_columns([column])


def _column_of_lines(
    lines: Mapping[str, Sequence[str]], numbers: Sequence[int], column: str, column_argument: str
) -> dict[str, list[str | None]]:
    """Return a column of JSON lines, whatever else is in them.

    `datasets` would want the other columns to be the same, with values of the same types, in all.
    It tells cached results apart by this function's name: rename it when what it does changes.
    """
    values: list[str | None] = []
    for line, number in zip(lines["text"], numbers, strict=True):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line).get(column)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"JSON parse error in line {number + 1}: {error}") from error
        if not (value is None or isinstance(value, str)):
            held = reprlib.repr(value)  # one short line, whatever it is
            raise UsageError(
                f"{column_argument} holds {held}, which is not a string, at document {number}"
            )
        # Half of a character, which JSON can hold and no file of text: it stands for a cut.
        values.append(value and re.sub(r"[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", value))
    return {column: values}
