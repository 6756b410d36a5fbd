"""One of several SAEs that are trained together, each on a site of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor

from lightning_sae.several_sites import SeveralSites
from lightning_sae.sites import pairs_of

__all__ = ["ALONE", "Part", "part_of", "parts_of_widths"]


class Part(NamedTuple):
    """What is one SAE's, of all that several SAEs are given beside each other.

    Attributes:
        name: What its curves, its folder and messages are called by; "" if it is the only one.
        place: Of its site among the sites.
        columns: Of its activations among those beside each other.
    """

    name: str
    place: int
    columns: slice

    def of(self, x: Tensor) -> Tensor:
        """Return its activations (..., d_model) of all that are beside each other.

        They lie in memory as those of a run of its own, or products with them would round in
        another way.
        """
        return x[..., self.columns].contiguous()

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a held-out batch with its own activations."""
        own = {name: self.of(batch[name]) for name in ("activations", "states") if name in batch}
        return {**batch, **own}

    def of_outputs(self, outputs: Any) -> Any:
        """Return what a validation step returned of it."""
        return outputs.get(self.name, outputs) if isinstance(outputs, Mapping) else outputs

    def of_streams(self, streams: Any) -> Any:
        """Return where its activations are read, of the `SeveralSites` of the model."""
        alone = not (self.name and isinstance(streams, SeveralSites))
        return streams if alone else streams.streams[self.place]

    def of_description(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """Return what data modules say of their activations, as if this site alone were read."""
        if not self.name or "layer" not in described:
            return dict(described)
        layer, site = pairs_of(described["layer"], described["site"])[self.place]
        names = ("hook_name", "transformer_lens_hook_name")
        lists = {name: described[name] for name in names if isinstance(described.get(name), list)}
        own = {name: each[self.place] for name, each in lists.items()}
        return {**described, "layer": layer, "site": site, **own}

    def stage(self, stage: str) -> str:
        """Return what names of its curves of `train`, `val` or `test` begin with."""
        return f"{stage}/{self.name}" if self.name else stage

    def curve(self, name: str) -> str:
        """Return the name of its curve that is called `train/l0`, say, if it is the only one."""
        stage, _, rest = name.partition("/")
        return f"{self.stage(stage)}/{rest}"


ALONE: Final = Part("", 0, slice(None))
"""What the only SAE of a run is: the whole."""


def part_of(sae: Any) -> Part:
    """Return which part of a run an SAE is; of what is no SAE of ours, the whole."""
    part: Part = getattr(sae, "part", ALONE)
    return part


def parts_of_widths(sites: Mapping[str, int]) -> list[Part]:
    """Return a part for each of several sites.

    Args:
        sites: Names and widths, in the order in which they are beside each other.
    """
    parts, start = [], 0
    for place, (name, width) in enumerate(sites.items()):
        parts.append(Part(name, place, slice(start, start + width)))
        start += width
    return parts
