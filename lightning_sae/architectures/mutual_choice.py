"""Mutual Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sae.allocation import Importance, Matches, Scores
from lightning_sae.architectures.threshold import Scope, ThresholdSAE
from lightning_sae.checks import require_choice, require_k


class MutualChoiceSAE(ThresholdSAE):
    """The batch spends its whole budget of k matches a token wherever affinities are largest.

    Easy tokens get few features and hard ones many; k holds on average. The allocation is that of
    BatchTopK (Bussmann et al. 2024). In `eval()` mode one threshold, the running average of the
    smallest chosen affinity, takes the place of the batch.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        aux_coefficient: Weight of the loss that revives dead features; 0 leaves it out.
        dying_below: Share of its Zipf density below which a feature counts as dying and is helped
            too (`aux_zipf_loss`); 0 helps dead ones alone (`aux_k_loss`).
        k_aux: Dead features a token may use in that loss, and an eighth as many dying ones.
            Default: d_model / 2.
        aux_every: One token in so many is used for that loss: 8, say, makes it cheap, and noisier.
            Tokens should come shuffled.
        dead_after_tokens: Tokens without a match after which a feature counts as dead.
        importance: What pairs are ranked by: `lightning_sae.allocation.Importance`.
        scope: Under data parallelism, whether all ranks' tokens share the budget, or each rank has
            its own: `lightning_sae.architectures.threshold.Scope`.
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
        aux_coefficient: float = 1 / 32,
        dying_below: float = 0.75,
        k_aux: int | None = None,
        aux_every: int = 1,
        dead_after_tokens: int = 10_000_000,
        importance: Importance = "affinity",
        scope: Scope = "global",
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(
            d_model,
            n_features,
            aux_coefficient=aux_coefficient,
            dying_below=dying_below,
            k_aux=k_aux,
            aux_every=aux_every,
            dead_after_tokens=dead_after_tokens,
            importance=importance,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        require_k(k, n_features)
        require_choice(scope=scope, of=get_args(Scope))
        self.register_threshold()
        self.k = k
        self.scope = scope

    def choose(self, scores: Scores) -> Matches:
        """Match the k * tokens pairs of largest score in the batch."""
        return self.choose_by_batch(scores)
