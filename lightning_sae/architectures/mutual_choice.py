"""Mutual Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sae.allocation import Importance, Matches, mutual_choice
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.checks import require_k


class MutualChoiceSAE(ThresholdSAE):
    """The batch spends its whole budget of k matches a token wherever affinities are largest.

    Easy tokens get few features and hard ones many; k holds on average. The allocation is that of
    BatchTopK (Bussmann et al. 2024). In `eval()` mode one threshold, the running average of the
    smallest chosen affinity, takes the place of the batch.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
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
        self.register_threshold()
        self.k = k

    def choose(self, scores: Tensor) -> Matches:
        """Match the k * tokens pairs of largest score in the batch."""
        return mutual_choice(scores, self.k * scores.shape[0])

    def batch_threshold(self, scores: Tensor, matches: Matches) -> Tensor:
        """Return the smallest chosen score; zero if nothing was positive."""
        chosen = scores[matches.token, matches.feature]
        return chosen.min() if len(matches) else scores.new_zeros(())

    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return the midpoint of the last chosen and first rejected score of all pairs."""
        budget = self.k * len(scaled)
        largest = scaled.new_empty(0)
        for tokens in scaled.split(1024):
            largest = torch.cat([largest, self.scores(tokens).flatten()])
            largest = largest.topk(min(budget + 1, len(largest))).values
        return largest[-2:].mean().clamp_min(0)
