"""Whether a gradient comes in parts or as a plain tensor."""

from torch import Tensor

from lightning_sae.parallel.share import distributed_like, local
from lightning_sae.sparse.row_gradient import RowGradient
from lightning_sae.sparse.row_sums import RowSums

__all__ = ["GradientForm", "gradient_of"]


def gradient_of(sums: RowSums, *, in_parts: bool) -> Tensor:
    """Return a gradient, whole unless it may be in parts and these are smaller than all of it."""
    features, tokens = len(sums.starts) - 1, len(sums.table)
    return RowGradient.of(sums) if in_parts and tokens < features else sums.dense()


class GradientForm:
    """A hook on parameters, by which their gradient comes as a plain tensor or is left in parts.

    It is called with what all terms of a loss have added up to, before that is accumulated.

    Attributes:
        in_parts: Whether to leave it in parts, where it comes so.
    """

    def __init__(self) -> None:
        self.in_parts = False
        self._watched: tuple[Tensor, ...] = ()

    def watch(self, *parameters: Tensor) -> None:
        """Be the hook of those that are trained, and of no others from now on."""
        self._watched = tuple(each for each in parameters if each.requires_grad)
        for each in self._watched:
            each.register_hook(self)

    def may_come_in_parts(self, parameter: Tensor) -> bool:
        """Return whether terms may leave its gradient in parts: a hook meets them, or who asked."""
        return self.in_parts or any(parameter is watched for watched in self._watched)

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return a gradient in the form that is wanted, features shared out as they were."""
        own = local(gradient)
        if self.in_parts or not isinstance(own, RowGradient):
            return gradient
        return distributed_like(gradient, own.form())
