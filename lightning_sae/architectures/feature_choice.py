"""Feature Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sae.allocation import Importance, Matches, feature_choice, midpoint_thresholds
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.checks import require_k, require_not_negative
from lightning_sae.distributed import world_size
from lightning_sae.zipf import round_budgets, zipf_budgets


class FeatureChoiceSAE(ThresholdSAE):
    """Every feature has a budget of tokens in each batch, and chooses those of largest affinity.

    Budgets sum to k matches a token, and each is at least one match a batch, so that a feature
    fires in every batch in which its affinity is positive anywhere. They are equal (`uniform`) or
    fall off with the feature's rank by the Zipf-Mandelbrot law (`zipf`), feature 0 having the
    largest. In `eval()` mode one threshold a feature, the running average of the midpoint between
    its last chosen and first rejected affinity, takes the place of the batch.

    The paper sets budgets by a Zipf distribution; its constants, and the rank each feature gets,
    are not known to us. Here ranks are fixed from the start.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        budgets: How matches are shared out among the features, `uniform` or `zipf`.
        zipf_exponent: s in (rank + q)^-s; only for `zipf`.
        zipf_offset: q in (rank + q)^-s. Default: n_features / 1000; only for `zipf`.
        max_density: Share of a batch's tokens that one feature may take at most; only for `zipf`.
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
        budgets: Literal["uniform", "zipf"] = "zipf",
        zipf_exponent: float = 1.0,
        zipf_offset: float | None = None,
        max_density: float = 0.5,
        aux_k_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after_tokens: int = 10_000_000,
        importance: Importance = "affinity",
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        if budgets not in ("uniform", "zipf"):
            raise ValueError(f"budgets={budgets!r} is neither 'uniform' nor 'zipf'")
        require_not_negative(zipf_exponent=zipf_exponent, zipf_offset=zipf_offset or 0.0)
        if not k / n_features <= max_density <= 1:
            raise ValueError(
                f"max_density={max_density} is out of range: as a share of tokens it is at most 1, "
                f"and k={k} matches need at least k / n_features = {k / n_features:.3g}"
            )
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
        self.register_threshold(n_features)
        self.k = k
        self.budgets = budgets
        self.zipf_exponent = zipf_exponent if budgets == "zipf" else 0.0
        self.zipf_offset = zipf_offset
        self.max_density = max_density if budgets == "zipf" else 1.0

    def budgets_for(self, tokens: int) -> Tensor:
        """Return each feature's expected matches in a batch, float64, shape (n_features,).

        Args:
            tokens: Size of the batch.

        Raises:
            ValueError: If k matches a token cannot be shared out so that every feature gets one.
        """
        total = self.k * tokens
        if total < self.n_features:
            needed = -(-self.n_features // self.k) * world_size()
            raise ValueError(
                f"k={self.k} matches for each of {tokens} tokens cannot give each of "
                f"n_features={self.n_features} features one match: "
                f"batch_size={needed} or more can"
            )
        return zipf_budgets(
            total,
            self.n_features,
            exponent=self.zipf_exponent,
            offset=self.zipf_offset,
            maximum=max(self.max_density * tokens, 1.0),
        )

    def choose(self, scores: Tensor) -> Matches:
        """Match every feature with its budget of tokens, rounded to integers at random."""
        tokens = scores.shape[0]
        # The same on every rank, and again after a resumption: tokens_seen is both.
        budgets = round_budgets(self.budgets_for(tokens), seed=int(self.tokens_seen))
        return feature_choice(scores, budgets.to(scores.device))

    def batch_threshold(self, scores: Tensor, matches: Matches) -> Tensor:
        """Return the midpoint of each feature's last chosen and first rejected score."""
        return midpoint_thresholds(scores, matches)
