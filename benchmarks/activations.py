"""Synthetic activations, quick to draw at any size."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from benchmarks.rounds import Size

N_DIRECTIONS, ACTIVE, RANK = 8192, 24, 16


def draw(size: "Size", batches: int) -> list[Tensor]:
    """Return batches (tokens, d_model) of sparse directions, a low rank part, and noise.

    How often a direction is on follows a Zipf law; the low rank part stands for what all tokens
    share, as position and frequency do in a language model.
    """
    random = torch.Generator().manual_seed(0)
    width = size.d_model
    directions = functional.normalize(torch.randn(N_DIRECTIONS, width, generator=random), dim=1)
    dense = torch.randn(RANK, width, generator=random)
    law = 1 / (torch.arange(N_DIRECTIONS) + 8.0)

    def batch() -> Tensor:
        shape = (size.tokens, ACTIVE)
        on = torch.multinomial(law.expand(size.tokens, -1), ACTIVE, generator=random)
        strength = 4 * (0.5 + torch.rand(shape, generator=random))
        sparse = functional.embedding_bag(on, directions, per_sample_weights=strength, mode="sum")
        shared = 0.2 * torch.randn(size.tokens, RANK, generator=random) @ dense
        return sparse + shared + 0.1 * torch.randn(size.tokens, width, generator=random)

    return [batch() for _ in range(batches)]
