"""Runs of a language model with something else in place of the activations of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.metrics.next_token_losses import next_token_losses
from lightning_sae.numerics import widest_float
from lightning_sae.residual_stream import ResidualStream

__all__ = ["Runs", "cross_entropy", "kept_and_scored"]


def kept_and_scored(
    input_ids: Tensor, kept: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return which positions are edited and which of them are scored."""
    if input_ids.dim() != 2 or kept.shape != input_ids.shape or kept.dtype != torch.bool:
        raise UsageError(
            f"kept of shape {tuple(kept.shape)} and {kept.dtype}, input_ids of shape "
            f"{tuple(input_ids.shape)}: both must be (contexts, length), and kept torch.bool"
        )
    if attention_mask is not None:
        kept = kept & (attention_mask != 0)
    scored = kept.clone()
    scored[:, -1] = False  # no next token to predict
    if attention_mask is not None:
        scored[:, :-1] &= attention_mask[:, 1:] != 0
    return kept, scored


@dataclass(frozen=True)
class Runs:
    """The model on a batch of contexts, with one thing or another in place of the activations."""

    residual_stream: ResidualStream
    input_ids: Tensor
    kept: Tensor
    attention_mask: Tensor | None
    states: Tensor | None

    def __call__(self, replacement: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits with kept activations (tokens, d_model) replaced."""
        known = {"attention_mask": self.attention_mask, "states": self.states}
        known = {name: value for name, value in known.items() if value is not None}
        edit = _edit(self.kept, replacement)
        return self.residual_stream.replace(self.input_ids, edit, **known)


def _edit(kept: Tensor, replacement: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:  # (contexts, length, d_model)
        old = x[kept]  # (tokens, d_model)
        new = replacement(old)
        if new.shape != old.shape:
            raise UsageError(
                f"reconstruct returned shape {tuple(new.shape)} for activations of shape "
                f"{tuple(old.shape)}: it must keep the shape"
            )
        edited = x.clone()
        edited[kept] = new.to(x.dtype)
        return edited

    return edit


def cross_entropy(logits: Tensor, input_ids: Tensor, scored: Tensor) -> Tensor:
    """Return the losses of the next tokens of scored positions, summed, in nats, 0-d."""
    losses = next_token_losses(logits, input_ids)  # (contexts, length - 1)
    return losses[scored[:, :-1]].sum(dtype=widest_float(logits.device))
