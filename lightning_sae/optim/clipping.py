"""Clipping where Lightning refuses it for no need."""

from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

__all__ = ["clip_fused"]


def clip_fused(
    precision: Any, optimizer: Optimizer, value: float | None, algorithm: str | None
) -> bool:
    """Clip the gradients of a fused optimizer in mixed precision, and return whether it is one.

    Lightning refuses, because such an optimizer unscales gradients itself; it does not if they are
    unscaled already.

    Args:
        precision: The Trainer's precision plugin.
        optimizer: Whose gradients.
        value: Largest norm, or largest entry; None or 0 leaves gradients as they are.
        algorithm: `norm` or `value`. Default: `norm`.
    """
    if not (isinstance(precision, MixedPrecision) and optimizer.defaults.get("fused") and value):
        return False
    if precision.scaler is not None:
        precision.scaler.unscale_(optimizer)
    kind = GradClipAlgorithmType(algorithm or "norm")
    Precision.clip_gradients(precision, optimizer, value, kind)
    return True
