"""The directions of the features, each of unit norm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sae.numerics import wide
from lightning_sae.parallel.share import distributed_like, local

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """A direction a feature, and the point that no feature at all stands for.

    Whatever a training loop forgets, rows have unit norm in state dicts, and so in checkpoints:
    those that have not are written normalised.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.

    Attributes:
        weight: One row a feature, shape (n_features, d_model).
        bias: Origin of the codes in scaled activations, shape (d_model,).
    """

    def __init__(self, d_model: int, n_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(torch.randn(n_features, d_model), dim=1))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_state_dict_post_hook(_with_unit_norms)  # type: ignore[no-untyped-call]  # torch does not annotate it

    @torch.no_grad()
    def normalize(self) -> None:
        """Give every row of `weight` unit norm again."""
        rows = local(self.weight)
        rows.div_(_norms(rows))


def _norms(rows: Tensor) -> Tensor:
    """Return the norms of rows, (rows, 1), none of them zero."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp_min(1e-12)


@torch.no_grad()
def _with_unit_norms(
    decoder: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    weight = state_dict.get(f"{prefix}weight")  # none if it is parametrised
    if weight is None or weight.is_meta:
        return
    rows = local(weight)
    norms = _norms(wide(rows))
    # Rows that were normalised stay as they are, bit for bit: what is left is rounding.
    rounding = max(1e-5, torch.finfo(rows.dtype).eps)
    if bool(((norms - 1).abs() > rounding).any()):
        state_dict[f"{prefix}weight"] = distributed_like(weight, (rows / norms).to(rows))
