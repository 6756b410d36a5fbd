"""The tokens that each feature's direction promotes and demotes in the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.residual_stream import ResidualStream

__all__ = ["LogitLens", "logit_lens"]

DIRECTIONS: Final = 64
"""Directions whose logits are in memory at once."""


@dataclass(frozen=True)
class LogitLens:
    """Tokens whose logits a direction raises and lowers most, the most first.

    Attributes:
        promoted: Token ids, int64, (n_features, n).
        promoted_logits: By how much, float32, (n_features, n).
        demoted: Token ids, int64, (n_features, n).
        demoted_logits: By how much, float32, (n_features, n).
    """

    promoted: Tensor
    promoted_logits: Tensor
    demoted: Tensor
    demoted_logits: Tensor


@torch.no_grad()
def logit_lens(residual_stream: ResidualStream, directions: Tensor, n: int = 10) -> LogitLens:
    """Return what directions do to the logits, read directly (nostalgebraist 2020, "logit lens").

    A direction takes the place of what the model's last block puts out, with an entry's root mean
    square of 1, and what follows there, final norm and unembedding, makes logits of it. Those that
    it makes of zeros are taken off: what biases add is not the direction's doing. Blocks between
    the layer and the last one are passed over, so the earlier the layer, the less it says.

    Args:
        residual_stream: Any layer of a causal language model.
        directions: (n_features, d_model), of any length.
        n: Tokens to return of each.
    """
    model = residual_stream.model
    last = ResidualStream(model, model.config.get_text_config().num_hidden_layers - 1)
    ids = torch.zeros(DIRECTIONS, 1, dtype=torch.int64, device=last.device)
    states = last.read(ids)
    width = directions.shape[1]

    def logits(rows: Tensor) -> Tensor:
        padded = functional.pad(rows, (0, 0, 0, DIRECTIONS - len(rows))).unsqueeze(1)
        return last.replace(ids, lambda _: padded, states=states)[: len(rows), 0].float()

    nothing = logits(torch.zeros(1, width, device=last.device))
    found = []
    for rows in directions.to(last.device).float().split(DIRECTIONS):
        raised = logits(functional.normalize(rows, dim=1) * width**0.5) - nothing
        most, least = raised.topk(n, dim=1), raised.topk(n, dim=1, largest=False)
        found.append((most.indices, most.values, least.indices, least.values))
    return LogitLens(*(torch.cat(each).cpu() for each in zip(*found, strict=True)))
