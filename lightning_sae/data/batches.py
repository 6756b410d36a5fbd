"""What the batches are that an SAE is trained and measured on."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["activations_in"]


def activations_in(batch: Any) -> Tensor:
    """Return the activations in a batch: a tensor, a mapping, or what a TensorDataset yields.

    Raises:
        TypeError: If it holds no tensor there.
    """
    if isinstance(batch, Mapping):
        batch = batch["activations"]
    if isinstance(batch, Sequence):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(f"a batch must hold a tensor of activations, not {type(batch).__name__}")
    return batch
