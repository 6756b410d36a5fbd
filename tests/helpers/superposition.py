"""Synthetic activations with a known sparse dictionary, for tests that must learn something."""

import torch
from torch import Tensor
from torch.nn import functional


def superposition(tokens: int, d_model: int, n_features: int, seed: int) -> Tensor:
    """Return tokens that each sum a few of `n_features` fixed directions, rare ones more rarely.

    Args:
        tokens: Tokens to draw.
        d_model: Width, fewer than the features.
        n_features: Directions; they do not depend on the seed.
        seed: Decides which features are on, and how strongly.
    """
    directions = torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    density = 0.3 / (1 + torch.arange(n_features)) ** 0.7
    on = torch.rand(tokens, n_features, generator=generator) < density
    strength = 1 + torch.rand(tokens, n_features, generator=generator)
    return (on * strength) @ functional.normalize(directions, dim=1)
