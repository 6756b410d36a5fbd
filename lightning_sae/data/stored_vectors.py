"""Vectors in files as inputs of a stream: each a context, or a run of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.vector_files import VectorFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["StoredVectors"]


class StoredVectors:
    """The inputs that files of vectors hold, by their numbers: (length, d_model) each.

    Where vectors are stored by context an input is a context. Others are read in runs of
    neighbours; the last run of a file may be short, and is filled up with positions that are not
    kept.

    Args:
        files: At least one; all of one width and dtype.
        run_length: Vectors of a run.
        skip_positions: First positions of each context that are not kept.

    Raises:
        UsageError: If positions are to be skipped of vectors that are not stored by context.
    """

    def __init__(self, files: Sequence[VectorFile], run_length: int, skip_positions: int) -> None:
        self.files = list(files)
        *contexts, self.d_model = files[0].shape[1:]
        self.by_context = bool(contexts)
        self.length = contexts[0] if contexts else run_length
        self.skip_positions = skip_positions
        if skip_positions and not self.by_context:
            raise UsageError(
                f"skip_positions={skip_positions}: the vectors are not stored by context, as "
                "(contexts, length, d_model), so that none is known to be the first of one"
            )
        if skip_positions >= self.length:
            raise UsageError(f"skip_positions={skip_positions} leaves nothing of {self.length}")

    @property
    def dtype(self) -> str:
        """That of the vectors."""
        return self.files[0].dtype

    @property
    def vectors(self) -> int:
        """Vectors in all files, those that are not kept included; of what is there twice, once."""
        if self.by_context:
            return len(self.distinct()) * self.length
        return sum(file.shape[0] for file in self.files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Tensor:
        return self.read([number])[0]

    def distinct(self) -> NDArray[np.int64]:
        """Return the numbers of the inputs, but for those that files hold once more."""
        if self._keys is None:
            return np.arange(len(self))
        return np.sort(np.unique(self._keys, return_index=True)[1])

    def held_out(self) -> NDArray[np.bool_]:
        """Return which inputs a file says are held out, (inputs,)."""
        if all(file.held_out is None for file in self.files):
            return np.zeros(len(self), np.bool_)
        marks = [
            torch.zeros(file.shape[0]).bool() if file.held_out is None else file.held_out
            for file in self.files
        ]
        found: NDArray[np.bool_] = torch.cat(marks).numpy()
        # One run may have held out what another one trained on.
        return found if self._keys is None else np.isin(self._keys, self._keys[found])

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Return the vectors of inputs, (inputs, length, d_model), in the dtype of the files."""
        dtype = torch.float32 if self.dtype == "float64" else getattr(torch, self.dtype)
        found = torch.zeros(len(numbers), self.length, self.d_model, dtype=dtype)
        for place, number in enumerate(numbers):
            file, first, end = self._rows(number)
            rows = file.rows(first, end).to(dtype).flatten(0, -2)  # (positions, d_model)
            found[place, : len(rows)] = rows
        return found

    def kept(self, numbers: Sequence[int]) -> Tensor:
        """Return which positions of inputs count: a bool mask, (inputs, length)."""
        found = torch.zeros(len(numbers), self.length, dtype=torch.bool)
        for place, number in enumerate(numbers):
            file, first, end = self._rows(number)
            if file.kept is not None:
                found[place] = file.kept(first, end).flatten()
            else:
                found[place, : self.length if self.by_context else end - first] = True
        found[:, : self.skip_positions] = False
        return found

    @cached_property
    def _keys(self) -> NDArray[np.int64] | None:
        """What tells inputs from others, (inputs,); None if a file does not say."""
        keys = [file.keys for file in self.files]
        if not self.by_context or any(each is None for each in keys):
            return None
        return torch.cat([each for each in keys if each is not None]).numpy()

    @cached_property
    def _ends(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The number after the last input of each file."""
        per_input = 1 if self.by_context else self.length
        return np.cumsum([-(-file.shape[0] // per_input) for file in self.files])

    def _rows(self, number: int) -> tuple[VectorFile, int, int]:
        """Return the file of an input, and its rows there, from one to before another."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        within = number - (int(self._ends[place - 1]) if place else 0)
        file, per_input = self.files[place], 1 if self.by_context else self.length
        first = within * per_input
        return file, first, min(first + per_input, file.shape[0])
