"""Pairs that are found a few at a time."""

import torch
from torch import Tensor

from lightning_sae.matches import Matches, Pairs


class Found:
    """Pairs that are found a few at a time, collected in memory made in advance.

    Kept as they come, these small tensors, made between large ones that come and go, would leave
    gaps that no large one fits into, and memory would grow to several times what tensors hold.

    Args:
        shape: (tokens, features) of what they are found in.
        room: How many are expected; there may be more.
        device: Where they are.
    """

    def __init__(self, shape: tuple[int, int], room: int, device: torch.device) -> None:
        self.shape = shape
        number = torch.empty(0, dtype=torch.int64, device=device)
        self._columns: Pairs = (number, number, number.float())
        self._room = room
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, token: Tensor, feature: Tensor, value: Tensor) -> None:
        """Add pairs, shape (pairs,) each, behind those that are there."""
        start, self._count = self._count, self._count + len(token)
        if self._count > len(self._columns[0]) or value.dtype != self._columns[2].dtype:
            self._room = max(self._room, self._count)
            there = self._columns
            room = (self._room,)
            self._columns = (token.new_empty(room), feature.new_empty(room), value.new_empty(room))
            self._write(0, *(column[:start] for column in there))
            self._room *= 2
        self._write(start, token, feature, value)

    def clear(self) -> None:
        """Forget all pairs."""
        self._count = 0

    def pairs(self) -> Matches:
        """Return all pairs, in the order they came in, until others are added or forgotten."""
        token, feature, value = (column[: self._count] for column in self._columns)
        return Matches(token, feature, value, self.shape)

    def _write(self, start: int, *pairs: Tensor) -> None:
        for column, new in zip(self._columns, pairs, strict=True):
            column[start : start + len(new)] = new
