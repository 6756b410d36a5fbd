"""The language model's loss, token by token."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.checks import UsageError


def next_token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the cross-entropy of each next token, in nats.

    Args:
        logits: Shape (contexts, length, vocabulary); those at the last position are not used.
        input_ids: Token ids, shape (contexts, length).

    Returns:
        Float32, shape (contexts, length - 1). In column t: the loss at position t, of predicting
        token t + 1; so also how surprising token t + 1 was.

    Raises:
        ValueError: If a shape is not as above.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
        >>> next_token_losses(logits, torch.tensor([[0, 1, 0]]))
        tensor([[0.6931, 0.1269]])
    """
    if input_ids.dim() != 2 or logits.shape[:-1] != input_ids.shape:
        raise UsageError(
            f"logits of shape {tuple(logits.shape)} and input_ids of shape "
            f"{tuple(input_ids.shape)}: must be (contexts, length, vocabulary), (contexts, length)"
        )
    next_ids = input_ids[:, 1:]
    losses = torch.empty(next_ids.shape, device=logits.device)
    # One context at a time: log probabilities of a batch are larger than its logits.
    for loss, rows, ids in zip(losses, logits[:, :-1], next_ids, strict=True):
        loss.copy_(functional.cross_entropy(rows.float(), ids, reduction="none"))
    return losses
