"""How wide numbers are: what is summed, divided or compared must not depend on a 16-bit type."""

import torch
from torch import Tensor

_PIECE = 1 << 16  # entries divided at a time


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if that is what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def typed_as(result: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype of another if that is a floating-point type, else as it is."""
    return result.to(like.dtype) if like.is_floating_point() else result


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that lacks it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def just_above(bounds: Tensor) -> Tensor:
    """Return the next larger numbers: what is at or above them is strictly above the bounds."""
    return bounds.nextafter(torch.full_like(bounds, torch.inf))


def just_below(bounds: Tensor) -> Tensor:
    """Return the next smaller numbers: what is strictly above them is at or above the bounds."""
    return bounds.nextafter(torch.full_like(bounds, -torch.inf))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide totals of any shape by one, at full width; the result is float32, NaN for 0 / 0.

    Example:
        >>> ratio(torch.tensor([1, 3]), torch.tensor(4))
        tensor([0.2500, 0.7500])
    """
    whole = whole.to(widest_float(whole.device))
    shares = torch.empty(part.shape, dtype=torch.float32, device=part.device)
    # In pieces: at full width the counts of a large dictionary take as much memory as they are.
    pieces = part.detach().reshape(-1).split(_PIECE), shares.view(-1).split(_PIECE)
    for totals, quotients in zip(*pieces, strict=True):
        torch.div(totals.to(whole), whole, out=quotients)
    return shares
