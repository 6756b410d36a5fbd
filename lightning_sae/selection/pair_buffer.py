"""Memory for pairs that are found a few at a time."""

import torch
from torch import Tensor

from lightning_sae.matches import Matches, Pairs


class PairBuffer:
    """Pairs that are found a few at a time, collected in memory made in advance.

    Kept as they come, these small tensors, made between large ones that come and go, would leave
    gaps that no large one fits into, and memory would grow to several times what tensors hold.

    Args:
        shape: (tokens, features) of what they are found in.
        capacity: How many are expected; there may be more.
        device: Where they are.
    """

    def __init__(self, shape: tuple[int, int], capacity: int, device: torch.device) -> None:
        self.shape = shape
        number = torch.empty(0, dtype=torch.int64, device=device)
        self._columns: Pairs = (number, number, number.float())
        self._capacity = capacity
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, token: Tensor, feature: Tensor, value: Tensor) -> None:
        """Add pairs, shape (pairs,) each, behind those that are there."""
        start, self._count = self._count, self._count + len(token)
        if self._count > len(self._columns[0]) or value.dtype != self._columns[2].dtype:
            self._capacity = max(self._capacity, self._count)
            there = self._columns
            size = (self._capacity,)
            self._columns = (token.new_empty(size), feature.new_empty(size), value.new_empty(size))
            self._write(0, *(column[:start] for column in there))
            self._capacity *= 2
        self._write(start, token, feature, value)

    def replace(self, pairs: Matches) -> None:
        """Forget all pairs, and add others."""
        self.clear()
        self.add(pairs.token, pairs.feature, pairs.value)

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
