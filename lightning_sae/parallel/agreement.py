"""What keeps groups of devices alike that share out the features: Lightning leaves it to us.

Each group has other tokens, and all of them the same weights.
"""

from torch import nn

from lightning_sae.parallel.layout import Layout
from lightning_sae.parallel.share import local

__all__ = ["average_gradients", "start_alike"]


def start_alike(module: nn.Module, layout: Layout) -> None:
    """Give all groups the weights of the first."""
    if layout.share.mesh is not None:
        for parameter in module.parameters():
            layout.ranks.broadcast(local(parameter.data))


def average_gradients(module: nn.Module, layout: Layout) -> None:
    """Make each gradient, in place, the mean over groups.

    Those of an earlier batch, if they accumulate, are equal and stay as they are.
    """
    if layout.share.mesh is not None and layout.ranks.size > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                gradient.copy_(layout.ranks.mean(gradient))
