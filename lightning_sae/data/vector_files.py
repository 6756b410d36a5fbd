"""Files of vectors that someone has stored: safetensors, NumPy, parquet, and saved data sets."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from lightning_sae.checks import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["METADATA", "VectorFile", "open_vectors", "require_alike"]

METADATA: Final = "lightning_sae"
"""The key under which a safetensors file says in JSON what its activations are of."""
FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
DTYPES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""What a safetensors file calls them."""
SAVED: Final = "state.json"
"""The file that `Dataset.save_to_disk` leaves in its folder."""


@dataclass(frozen=True)
class VectorFile:
    """Vectors in a file, of which any rows can be read without the others.

    Attributes:
        shape: (vectors, d_model), or (contexts, length, d_model).
        dtype: That of the vectors: float16, bfloat16, float32 or float64.
        rows: Returns the rows from one to before another, (rows, ...).
        kept: Returns which of their positions count, (rows, length); None: all do.
        made_of: What the file says that the activations are of.
        paths: Where it is; a data set is several files.
        keys: What tells each row from others, int64, (rows,); rows of one key are of one input.
        held_out: Which rows are not to be trained on, bool, (rows,); None: the file does not say.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], Tensor]
    kept: Callable[[int, int], Tensor] | None
    made_of: Mapping[str, Any]
    paths: tuple[Path, ...]
    keys: Tensor | None = None
    held_out: Tensor | None = None


def open_vectors(named: str, column: str | None, called: str) -> list[VectorFile]:
    """Open the files that a folder, a file or a pattern names, in the order of their names.

    Args:
        named: A file, a folder of files of one format, a pattern such as `layer3/*.npy`, or a
            folder that `Dataset.save_to_disk` has written, as SAELens' cache is.
        column: Tensor or column that holds the vectors. None: the only one that can.
        called: What messages call it: the argument that names it, and its value.

    Raises:
        UsageError: If there are none, or one cannot be read or is not like the others.
    """
    paths = _paths(named, called)
    suffix = paths[0].suffix
    if paths[0].is_dir() or suffix == ".parquet":
        files = [_of_dataset(paths, column, called)]
    else:
        reader = {".safetensors": _of_safetensors, ".npy": _of_npy}[suffix]
        files = [reader(path, column) for path in paths]
    require_alike(files)
    filled = [file for file in files if file.shape[0]]
    if not filled:
        raise UsageError(f"{called} holds no vectors")
    return filled


def require_alike(files: Sequence[VectorFile]) -> None:
    """Raise UsageError unless all files hold vectors of one shape and dtype, made of the same."""
    first = files[0]
    for file in files:
        for what, here, there in (
            ("vectors of", file.shape[1:], first.shape[1:]),
            ("vectors in", file.dtype, first.dtype),
            ("activations of", _decisive(file.made_of), _decisive(first.made_of)),
        ):
            if here != there:
                raise UsageError(
                    f"'{file.paths[0]}' has {what} {here}, and '{first.paths[0]}' {there}"
                )


def _decisive(made_of: Mapping[str, Any]) -> dict[str, Any]:
    # Names of a model may differ, as where it lies does.
    return {name: made_of.get(name) for name in ("weights", "layer", "model_dtype")}


def _paths(named: str, called: str) -> list[Path]:
    path = Path(named).expanduser()
    suffixes = (".safetensors", ".npy", ".parquet")
    if path.is_dir():
        if (path / SAVED).is_file():
            return [path]
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    elif path.is_file():
        found = [path]
    elif glob.has_magic(named):
        # `Path.glob` takes no absolute pattern.
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - as said
    else:
        raise UsageError(f"{called} does not exist")
    if not found or any(file.suffix not in suffixes for file in found):
        what = f"'{found[0].name}'" if found else "nothing"
        raise UsageError(f"{called} should be files in {', '.join(suffixes)}, and is {what}")
    kinds = sorted({file.suffix for file in found})
    if len(kinds) > 1:
        raise UsageError(f"{called} holds files in {' and '.join(kinds)}: name those of one kind")
    return found


def _of_safetensors(path: Path, column: str | None) -> VectorFile:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt")  # which maps it, and holds no descriptor
        # It has keys, but cannot be iterated over.
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - as said
        made_of = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if not isinstance(made_of, dict):
            raise ValueError(f"{METADATA} in its metadata is no JSON object")
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
    dtypes = {name: DTYPES.get(each.get_dtype(), each.get_dtype()) for name, each in slices.items()}
    name = _chosen(
        column,
        slices,
        [name for name in slices if dtypes[name] in FLOATS and len(shapes[name]) in (2, 3)],
        str(path),
    )
    kept = slices.get("kept") if shapes.get("kept") == shapes[name][:-1] else None
    by_row = {each for each, shape in shapes.items() if made_of and shape == shapes[name][:1]}
    return VectorFile(
        _checked_shape(shapes[name], dtypes[name], f"'{path}'"),
        dtypes[name],
        rows=lambda first, end: slices[name][first:end],
        kept=None if kept is None else lambda first, end: kept[first:end].bool(),
        made_of=made_of,
        paths=(path,),
        keys=slices["key"][:] if "key" in by_row else None,
        held_out=slices["held_out"][:].bool() if "held_out" in by_row else None,
    )


def _of_npy(path: Path, column: str | None) -> VectorFile:
    if column is not None:
        raise UsageError(f"column={column!r}: '{path}' holds one array, which has no name")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return VectorFile(
        _checked_shape(array.shape, array.dtype.name, f"'{path}'"),
        array.dtype.name,
        rows=partial(_rows_of_npy, path),
        kept=None,
        made_of={},
        paths=(path,),
    )


def _rows_of_npy(path: Path, first: int, end: int) -> Tensor:
    # Opened each time: a map that stays holds a descriptor, and there may be thousands of files.
    rows = np.load(path, mmap_mode="r")[first:end]
    return torch.from_numpy(np.array(rows, rows.dtype.newbyteorder("=")))  # torch knows no other


def _of_dataset(paths: Sequence[Path], column: str | None, called: str) -> VectorFile:
    from datasets import load_dataset, load_from_disk

    try:
        if paths[0].is_dir():
            rows = load_from_disk(str(paths[0]))
        else:
            files = [glob.escape(str(path)) for path in paths]
            rows = load_dataset("parquet", data_files={"train": files}, split="train")
        if not hasattr(rows, "features"):
            raise ValueError(f"it has the splits {', '.join(rows)}: name the folder of one")
    except Exception as error:  # there is no end to what damaged files make it raise
        raise _unreadable(called, error.__cause__ or error) from error
    candidates = [name for name, feature in rows.features.items() if _holds_floats(feature)]
    name = _chosen(column, rows.features, candidates, called)
    table = rows.select_columns([name]).with_format("arrow")
    read = partial(_rows_of_dataset, table, name, called)
    first = read(0, 1) if len(rows) else torch.empty(0, 0)
    dtype = str(first.dtype).removeprefix("torch.")
    shape = (len(rows), *first.shape[1:])
    return VectorFile(
        _checked_shape(shape, dtype, called),
        dtype,
        rows=read,
        kept=None,
        made_of={},
        paths=tuple(paths),
    )


def _rows_of_dataset(table: Dataset, name: str, called: str, first: int, end: int) -> Tensor:
    """Return rows of a column of lists, or of lists of lists, as a tensor."""
    from pyarrow import compute

    array = table[first:end][name].combine_chunks()
    array = getattr(array, "storage", array)  # of `datasets`' own types, such as Array2D
    shape = [len(array)]
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        lengths = compute.list_value_length(array).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise UsageError(
                f"{called}: rows {first} to {end} of the column {name!r} differ in length"
            )
        shape.append(lengths[0])
        array = array.flatten()
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False))).view(shape)


def _holds_floats(feature: Any) -> bool:
    depth = 0
    if hasattr(feature, "shape"):  # Array2D
        return str(feature.dtype) in FLOATS and len(feature.shape) in (1, 2)
    while hasattr(feature, "feature"):  # a list
        feature, depth = feature.feature, depth + 1
    return depth in (1, 2) and str(getattr(feature, "dtype", "")) in FLOATS


def _chosen(
    column: str | None, names: Iterable[str], candidates: Sequence[str], called: str
) -> str:
    """Return the name of what holds the vectors."""
    found = ", ".join(names) or "nothing"
    if column is not None:
        if column not in candidates:
            what = "is no vectors of floats" if column in names else "is not there"
            raise UsageError(f"column={column!r} {what}: {called} has {found}")
        return column
    if "activations" in candidates:  # as files of ours have it
        return "activations"
    if len(candidates) != 1:
        raise UsageError(
            f"{called} has {found}, of which {len(candidates)} can be vectors: name it by `column`"
        )
    return candidates[0]


def _checked_shape(shape: Sequence[int], dtype: str, called: str) -> tuple[int, ...]:
    if dtype not in FLOATS:
        raise UsageError(f"{called} holds {dtype}: vectors must be one of {', '.join(FLOATS)}")
    if len(shape) not in (2, 3) or 0 in shape[1:]:
        raise UsageError(
            f"{called} has the shape {tuple(shape)}: vectors must be (vectors, d_model) or "
            "(contexts, length, d_model)"
        )
    return tuple(shape)


def _unreadable(path: Path | str, error: BaseException) -> UsageError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    called = f"'{path}'" if isinstance(path, Path) else path
    return UsageError(f"{called} cannot be read: {reason}")
