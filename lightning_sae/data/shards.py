"""Activations on disk, in files of one size: what a cache is made of."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.vector_files import METADATA
from lightning_sae.tensor_files import save_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SHARD_BYTES", "Shards", "bytes_in"]

SHARD_BYTES: Final = 256 * 2**20
"""Activations of a file. They are in memory until it is written, and once more meanwhile."""
NAME: Final = "activations-*.safetensors"


class Shards:
    """A folder of activations by input, which is added to in files of one size.

    A file holds of so many inputs `activations`, (inputs, length, d_model); `kept`, which of their
    positions count, (inputs, length) of 1 and 0; `held_out`, whether it is never trained on,
    (inputs,) of 1 and 0; `key`, by which an input is found again, (inputs,); and where inputs are
    tokens `input_ids`, (inputs, length). Its metadata say in JSON what the activations are of. It
    has its name only when it is complete, and is never changed.

    What several processes add at a time they add in files of their own, which the others see when
    they next look for what they do not have. A process that is killed loses what was to become its
    next file; any other end writes that first, be it smaller.

    Args:
        folder: Where the files are; made if need be.
        limit: Bytes that the folder may take. Beyond them no more is added, and a line says so.
        shard_bytes: Bytes of the activations of a file.

    Raises:
        UsageError: If the folder cannot be made, or a file in it is damaged.
    """

    def __init__(self, folder: Path, limit: float, shard_bytes: int = SHARD_BYTES) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir: cannot make '{folder}': {error.strerror}") from error
        # Where the process is may be another by the time of a write.
        self.folder = folder = folder.absolute()
        self.limit = limit
        self.shard_bytes = shard_bytes
        self.files: list[Path] = []
        self._names: set[str] = set()  # of these
        self._lock = RLock()
        self._keys: NDArray[np.int64] = np.empty(0, np.int64)  # sorted
        self._places: NDArray[np.int64] = np.empty((0, 2), np.int64)  # a file, and a row of it
        self._next = _NextFile()
        self._full = False
        self._opened: dict[Path, Any] = {}  # maps, which hold no descriptors
        self._look()
        # Whatever ends the process, but for a kill.
        weakref.finalize(self, _write_at_exit, self._next, folder, limit)

    def __len__(self) -> int:
        return len(self._keys) + len(self._next.keys)

    @property
    def made_of(self) -> dict[str, Any]:
        """What a file says that the activations are of; empty if there is none, or none says it."""
        from safetensors import safe_open

        with self._lock:
            if not self.files:
                return dict(self._next.made_of)
            file: Any = safe_open(str(self.files[0]), framework="pt")
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        return found

    def holds(self, keys: Sequence[int]) -> bool:
        """Whether the activations of all these inputs are here."""
        with self._lock:
            return all(key in self._next.keys or self._place(key) is not None for key in keys)

    def find(self, keys: Sequence[int]) -> list[Tensor | None]:
        """Return the activations of inputs, (length, d_model) each; None where they are not here.

        Raises:
            UsageError: If a file is damaged.
        """
        with self._lock:
            if not self.holds(keys):
                self._look()
            return [self._find(key) for key in keys]

    def add(
        self,
        keys: Sequence[int],
        activations: Tensor,
        beside: Mapping[str, Tensor],
        made_of: Mapping[str, Any],
    ) -> None:
        """Add the activations of inputs that are not here yet.

        Args:
            keys: What each is found by.
            activations: (inputs, length, d_model).
            beside: What else to write of each, by name, (inputs, ...).
            made_of: What the activations are of, as JSON has it.

        Raises:
            UsageError: If a file that is full now cannot be written.
        """
        with self._lock:
            for number, key in enumerate(keys):
                if self._full or key in self._next.keys or self._place(key) is not None:
                    continue
                row = {"activations": activations[number]}
                row |= {name: each[number] for name, each in beside.items()}
                if not self._next.takes(row, made_of):
                    self.write()
                self._next.append(key, row, made_of, self.shard_bytes)
                if self._next.is_full:
                    self.write()

    def write(self) -> None:
        """Write what was added and is in no file yet, however little it is.

        Raises:
            UsageError: If it cannot be written.
        """
        with self._lock:
            if not self._next.keys:
                return
            if bytes_in(self.folder) + self._next.bytes > self.limit:
                self._full = True
                self._next.clear()
                rank_zero_warn(
                    f"cache_limit_gb={self.limit / 1e9:g} is reached in '{self.folder}': no more "
                    "activations are kept"
                )
                return
            keys = np.fromiter(self._next.keys, np.int64)
            try:
                file = self._next.write(self.folder)
            except OSError as error:
                raise UsageError(f"cache_dir: {error}") from error
            self._list([file], [keys])
            self._next.clear()

    def _look(self) -> None:
        """List the files that others have added since."""
        with os.scandir(self.folder) as entries:  # there may be thousands, at each look
            names = sorted(each.name for each in entries if each.name not in self._names)
        new = [self.folder / name for name in names if fnmatch(name, NAME)]
        if new:
            self._list(new, [self._of_file(file, "key").numpy() for file in new])

    def _list(self, files: Sequence[Path], keys: Sequence[NDArray[np.int64]]) -> None:
        numbers = range(len(self.files), len(self.files) + len(files))
        places = [
            np.stack([np.full_like(k, n), np.arange(len(k))], 1)
            for n, k in zip(numbers, keys, strict=True)
        ]
        self.files += files
        self._names.update(file.name for file in files)
        # What several processes have added comes twice: the first file's counts.
        self._keys, first = np.unique(np.concatenate([self._keys, *keys]), return_index=True)
        self._places = np.concatenate([self._places, *places])[first]

    def _place(self, key: int) -> tuple[Path, int] | None:
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        file, row = self._places[at].tolist()
        return self.files[file], row

    def _find(self, key: int) -> Tensor | None:
        if key in self._next.keys:
            return self._next.activations(key)
        place = self._place(key)
        return None if place is None else self._of_file(place[0], "activations", place[1])

    def _of_file(self, file: Path, name: str, row: int | None = None) -> Tensor:
        from safetensors import safe_open

        try:
            if file not in self._opened:
                self._opened[file] = safe_open(str(file), framework="pt")
            found: Tensor = self._opened[file].get_slice(name)[slice(None) if row is None else row]
        except Exception as error:  # which safetensors has several of
            raise UsageError(
                f"cache_dir: {file} is damaged ({error}); delete it, and it is computed again"
            ) from error
        return found


class _NextFile:
    """The inputs that become a file once there are as many as go into one."""

    def __init__(self) -> None:
        self.keys: dict[int, int] = {}  # and their rows
        self.columns: dict[str, Tensor] = {}
        self.made_of: Mapping[str, Any] = {}

    @property
    def is_full(self) -> bool:
        return bool(self.columns) and len(self.keys) == len(self.columns["activations"])

    @property
    def bytes(self) -> int:
        return len(self.keys) * sum(each[0].nbytes for each in self.columns.values())

    def takes(self, row: Mapping[str, Tensor], made_of: Mapping[str, Any]) -> bool:
        """Whether an input is like those that are here, so that one file can hold all of them."""
        like = {name: (each.shape, each.dtype) for name, each in row.items()}
        here = {name: (each.shape[1:], each.dtype) for name, each in self.columns.items()}
        return not self.keys or (like == here and made_of == self.made_of)

    def append(
        self, key: int, row: Mapping[str, Tensor], made_of: Mapping[str, Any], size: int
    ) -> None:
        if not self.keys:
            rows = max(1, size // row["activations"].nbytes)
            self.columns = {n: torch.empty(rows, *x.shape, dtype=x.dtype) for n, x in row.items()}
            self.made_of = made_of
        for name, each in row.items():
            self.columns[name][len(self.keys)] = each
        self.keys[key] = len(self.keys)

    def activations(self, key: int) -> Tensor:
        return self.columns["activations"][self.keys[key]].clone()  # which is used again

    def write(self, folder: Path) -> Path:
        keys = torch.tensor(list(self.keys))
        tensors = {name: each[: len(keys)] for name, each in self.columns.items()}
        name = hashlib.sha256(keys.numpy().tobytes()).hexdigest()[:16]
        path = folder / NAME.replace("*", name)
        save_tensors(tensors | {"key": keys}, path, **{METADATA: json.dumps(self.made_of)})
        return path

    def clear(self) -> None:
        self.keys, self.columns = {}, {}


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files that are in a folder of activations."""
    return sum(file.stat().st_size for file in folder.glob(NAME))


def _write_at_exit(rest: _NextFile, folder: Path, limit: float) -> None:
    if rest.keys and bytes_in(folder) + rest.bytes <= limit:
        try:
            rest.write(folder)
        except OSError as error:
            rank_zero_warn(f"cache_dir: {error}")
