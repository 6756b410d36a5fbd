"""What a run keeps of its activations: how much that is, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_sae.checks import UsageError
from lightning_sae.data.shards import bytes_in

__all__ = ["CacheNeeds"]


@dataclass(frozen=True)
class CacheNeeds:
    """What a run keeps, if none of it is there yet.

    Attributes:
        training: Inputs to train on, each counted once.
        held_out: Inputs to validate and test on, at most.
        bytes_per_input: Of its activations.
        folder: Where they are kept.
        noun: What messages call inputs, in the plural.
        there: Returns how many of them are kept there already; asked only where that decides.
    """

    training: int
    held_out: int
    bytes_per_input: int
    folder: Path
    noun: str
    there: Callable[[], int] = lambda: 0

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.training + self.held_out

    @property
    def gigabytes(self) -> float:
        """What they take."""
        return self.inputs * self.bytes_per_input / 1e9

    def __str__(self) -> str:
        return f"{self.inputs:,} {self.noun} take {self.gigabytes:.3g} GB in '{self.folder}'"

    def require_room(self, limit_gb: float, *, may_halve: bool) -> None:
        """Raise UsageError if the folder would go beyond the limit, or the disk has no room.

        Args:
            limit_gb: The limit.
            may_halve: Whether float16 would take half as much.
        """
        instead = "take fewer steps"
        if may_halve:
            instead += f", or cache_dtype=float16, with {self.gigabytes / 2:.3g} GB"
        if self.gigabytes > limit_gb:
            raise UsageError(
                f"cache_dir: {self}, more than cache_limit_gb={limit_gb:g}: raise it, {instead}"
            )
        held = bytes_in(self.folder) / 1e9 if self.folder.is_dir() else 0.0
        places = (self.folder, *self.folder.absolute().parents)
        nearest = next(place for place in places if place.is_dir())
        free = shutil.disk_usage(nearest).free / 1e9
        missing = self.gigabytes
        if missing > min(free, limit_gb - held) and held:
            missing = (self.inputs - self.there()) * self.bytes_per_input / 1e9
        if held + missing > limit_gb:
            raise UsageError(
                f"cache_dir: {self}, {missing:.3g} of which are not there yet, beside {held:.3g} "
                f"that are: more than cache_limit_gb={limit_gb:g}: raise it, name another folder, "
                f"{instead}"
            )
        if missing > free:
            raise UsageError(
                f"cache_dir: {self}, {missing:.3g} of which are not there yet, and the disk has "
                f"room for {free:.3g}: {instead}"
            )
