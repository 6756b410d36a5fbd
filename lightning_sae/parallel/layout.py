"""What a process has of the tokens and of the features: asked of one object, known to no other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh

from lightning_sae.parallel.ranks import Ranks
from lightning_sae.parallel.share import Share, share_features

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Which processes have other tokens, and which features are here.

    Args:
        share: Which features have their rows in this process: all, until they are shared out.
        ranks: The processes that train together on different tokens.
    """

    share: Share
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def on_one_device(cls, n_features: int) -> Layout:
        """Return the layout in which every process has all features."""
        return cls(Share((n_features,)))

    @classmethod
    def on_mesh(cls, n_features: int, mesh: DeviceMesh) -> Layout:
        """Return the layout in which features are shared out over a mesh of devices.

        Args:
            n_features: How many there are.
            mesh: Two-dimensional: along `tensor_parallel` processes have the same tokens and share
                out the features; along `data_parallel` features are the same and tokens differ.

        Raises:
            ValueError: If there are more processes than features.
        """
        share = share_features(n_features, mesh["tensor_parallel"])
        return cls(share, Ranks(mesh["data_parallel"]))
