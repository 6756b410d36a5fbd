"""TopK: Gao et al. 2024, https://arxiv.org/abs/2406.04093."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sae.allocation import Importance, Matches, token_choice
from lightning_sae.checks import require_k
from lightning_sae.sae import SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """Token choice: every token has the same budget of k matches.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Matches per token, 1 to n_features; fewer where fewer affinities are positive.
        aux_k_coefficient: Weight of the loss that revives dead features; 0 leaves it out.
        k_aux: Dead features a token may use in that loss. Default: d_model / 2.
        dead_after_tokens: Tokens without a match after which a feature counts as dead.
        importance: What pairs are ranked by: `lightning_sae.allocation.Importance`.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a schedule, stepped every batch, from the optimizer. Default: linear
            decay to zero over the run.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        aux_k_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after_tokens: int = 10_000_000,
        importance: Importance = "affinity",
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(
            d_model,
            n_features,
            aux_k_coefficient=aux_k_coefficient,
            k_aux=k_aux,
            dead_after_tokens=dead_after_tokens,
            importance=importance,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        require_k(k, n_features)
        self.k = k

    def choose(self, scores: Tensor) -> Matches:
        """Match every token with its k features of largest score."""
        return token_choice(scores, self.k)

    def choose_alone(self, scores: Tensor) -> Matches:
        """Match as in training: a token's choice does not depend on the other tokens."""
        return self.choose(scores)
