"""Features shared out over processes, for dictionaries that are too large for one device.

Each process holds the rows of some features: of the parameters, of their gradients, and of the
optimizer's state. All read the same tokens. Each computes affinities with its own features alone,
and which of them may be chosen: of feature choice that is the choice. These pairs go to all, and
what follows, from the choice to thresholds, counters and metrics, is the same everywhere, and as on
one process. Reconstructions are added up. So what travels in a step grows with the matches, with
tokens x d_model, and with features for one counter each, but not with features x d_model. (Where
groups of such processes have different tokens, they also average gradients.)

Parameters are torch's DTensors, which optimizers, gradient clipping and checkpoints know.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel.ranks import all_gather


@dataclass(frozen=True)
class Share:
    """Which features this process holds: a range of them, or all.

    Where it holds all, every method returns what it is given.

    Args:
        sizes: How many features each process holds, in the order of their numbers.
        mesh: The processes, one-dimensional. None: this one alone.

    Attributes:
        features: Features of all processes together.
        here: The range of those that this process holds.
    """

    sizes: tuple[int, ...]
    mesh: DeviceMesh | None = None
    features: int = field(init=False)
    here: slice = field(init=False)

    def __post_init__(self) -> None:
        bounds = [0, *itertools.accumulate(self.sizes)]
        place = 0 if self.mesh is None else self.mesh.get_local_rank()
        object.__setattr__(self, "features", bounds[-1])
        object.__setattr__(self, "here", slice(bounds[place], bounds[place + 1]))

    def among(self, features: Tensor) -> tuple[Share, Tensor]:
        """Return how some features are shared out, and those of them that are here.

        Args:
            features: Their numbers, ascending, the same on all processes, int64, (some,).

        Returns:
            The share, in which they are numbered anew from 0, and the places of those that this
            process holds in what it holds.
        """
        if self.mesh is None:
            return Share((len(features),)), features
        ends = torch.tensor(self.sizes, device=features.device).cumsum(0)
        bounds = [0, *torch.searchsorted(features, ends).tolist()]
        share = Share(tuple(b - a for a, b in itertools.pairwise(bounds)), self.mesh)
        return share, features[share.here] - self.here.start

    def everyones(self, rows: Tensor) -> Tensor:
        """Return the rows (n, ...) of all processes, one after another, without a gradient."""
        if self.mesh is None:
            return rows
        return torch.cat(all_gather(rows, self.mesh.get_group()))

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, as `everyones` does; those here have their gradient."""
        if self.mesh is None:
            return rows
        everyones = self.everyones(rows)
        return torch.cat([everyones[: self.here.start], rows, everyones[self.here.stop :]])

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts, each of which gets the gradient of the sum."""
        if self.mesh is None:
            return part
        parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        total: Tensor = parts.redistribute(placements=[Replicate()]).to_local()
        return total

    def fan_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors that are the same everywhere, to be read by the features of each process.

        Their gradients are the sums of those that they get from all processes.
        """
        if self.mesh is None:
            return tensors
        same = (DTensor.from_local(t, self.mesh, [Replicate()], run_check=False) for t in tensors)
        return tuple(tensor.to_local(grad_placements=[Partial()]) for tensor in same)

    def own(self, matches: Matches) -> Matches:
        """Return the matches of the features here, which are numbered from 0."""
        if self.mesh is None:
            return matches
        own = matches.select(self._own(matches))
        own.feature = own.feature - self.here.start
        own.shape = (own.shape[0], self.here.stop - self.here.start)
        return own

    def put(self, values: Tensor, matches: Matches) -> Tensor:
        """Return the values of matches, of which those of `own(matches)` are replaced by others."""
        if self.mesh is None:
            return values
        return matches.value.detach().index_put((self._own(matches),), values)

    def complete(self, values: Tensor, matches: Matches) -> Tensor:
        """Return values (matches,) of which each process knows those of `own(matches)`."""
        if self.mesh is None:
            return values
        zeros = values.new_zeros(len(matches))
        return self.sum(zeros.index_put((self._own(matches),), values))

    def _own(self, matches: Matches) -> Tensor:
        own: Tensor = (matches.feature >= self.here.start) & (matches.feature < self.here.stop)
        return own.nonzero().squeeze(1)


def share_features(n_features: int, mesh: DeviceMesh) -> Share:
    """Return how features are shared out: equally, the last process may have fewer.

    Raises:
        ValueError: If a process would be left without any.
    """
    each = -(-n_features // mesh.size())  # as DTensor has it
    last = n_features - each * (mesh.size() - 1)
    if last <= 0:
        raise UsageError(f"n_features={n_features} cannot be shared out over {mesh.size()} devices")
    return Share((each,) * (mesh.size() - 1) + (last,), mesh)


def distribute(module: nn.Module, share: Share, replicated: frozenset[str]) -> None:
    """Make DTensors of a module's parameters, in place.

    A process keeps its own rows of what it has. They are not sent: all rows together may be more
    than a device can hold.

    Args:
        module: All its parameters have one row a feature, but for those that are replicated.
        share: Which rows.
        replicated: Names of parameters that are the same everywhere.
    """
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        placement: Placement = Replicate() if name in replicated else Shard(0)
        rows = parameter.detach()
        if name not in replicated:
            rows = rows[share.here].clone()
        distributed = _from_local(rows, share.mesh, [placement], parameter)
        shard = nn.Parameter(distributed, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), attribute, shard)


def local(parameter: Tensor) -> Tensor:
    """Return this process's rows of a parameter: all, if it is not distributed."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def wide_rows(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Return this process's rows of parameters in float32, or in float64 if that is their dtype."""
    return tuple(
        rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in map(local, parameters)
    )


def distributed_like(other: Tensor, rows: Tensor) -> Tensor:
    """Return the tensor that is distributed as another one, and of which these rows are here."""
    if not isinstance(other, DTensor):
        return rows
    return _from_local(rows, other.device_mesh, other.placements, other)


def _from_local(
    rows: Tensor, mesh: DeviceMesh | None, placements: Sequence[Placement], like: Tensor
) -> Tensor:
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
