"""The ReLU SAE with an L1 penalty: Bricken et al. 2023,
https://transformer-circuits.pub/2023/monosemantic-features.
"""  # noqa: D205 - the link is the summary's end

from typing import Any

import torch
from torch import Tensor

from lightning_sae.allocation import Choice, threshold_choice
from lightning_sae.checks import UsageError, require_k, require_not_negative
from lightning_sae.core.gate import Gate
from lightning_sae.core.losses import sparsity_loss
from lightning_sae.core.penalty_weight import PenaltyWeight
from lightning_sae.matches import Matches
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.selection import Scores


class StandardSAE(SparseAutoencoder):
    """Every positive affinity is a match, and an L1 penalty keeps them few.

    There is no budget: how many matches a token gets follows from the penalty, which also shrinks
    all activations. The wider the activations, the larger a coefficient gives the same number of
    matches: the default suits d_model in the thousands. With a `k` the coefficient is where the
    weight begins, and a controller moves it until tokens have k matches: a wanted L0 needs no
    sweep. That is ours.

    Bricken et al. revive dead features by resampling: add
    `lightning_sae.callbacks.ResampleDeadFeatures`. Their coefficients are for activations as they
    come; the default here is that of Templeton et al. 2024 ("Scaling Monosemanticity"), who scale
    activations as is done here.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        l1_coefficient: Weight of the L1 norm of the codes per token, in units in which a centred
            token has a mean squared length of d_model.
        l1_warmup_tokens: Tokens over which the weight rises linearly from zero. An untrained SAE
            has far too many matches, which says nothing of the weight: no controller moves it yet.
        k: Matches a token that are wanted. Default: as many as the coefficient gives.
        aux_coefficient: Weight of a loss that revives dead features; the source has none.
        dead_after_tokens: Tokens without a match after which a feature counts as dead. Bricken et
            al.: 12,500 steps of 8,192 tokens.
        options: Those of `lightning_sae.SparseAutoencoder`.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        l1_coefficient: float = 5.0,
        *,
        l1_warmup_tokens: int = 0,
        k: int | None = None,
        aux_coefficient: float = 0.0,
        dead_after_tokens: int = 102_400_000,
        **options: Any,
    ) -> None:
        require_not_negative(l1_coefficient=l1_coefficient, l1_warmup_tokens=l1_warmup_tokens)
        if k is not None:
            require_k(k, n_features)
            if l1_coefficient == 0:
                raise UsageError(
                    f"l1_coefficient=0 is no weight that can be moved to k={k} matches"
                )
        super().__init__(
            d_model,
            n_features,
            aux_coefficient=aux_coefficient,
            dead_after_tokens=dead_after_tokens,
            **options,
        )
        self.l1_coefficient = l1_coefficient
        self.l1_warmup_tokens = l1_warmup_tokens
        self.k = k
        self.penalty_weight: PenaltyWeight | None = None if k is None else PenaltyWeight(k)

    def prepare(self, x: Tensor) -> None:
        """Let the weight that is moved begin at the coefficient."""
        super().prepare(x)
        if self.penalty_weight is not None and not self.penalty_weight.begun:
            self.penalty_weight.begin(torch.tensor(self.l1_coefficient, device=x.device))

    def choose(self, scores: Scores) -> Choice:
        """Match every pair of positive affinity."""
        return Choice(self.choose_per_token(scores))

    def choose_per_token(self, scores: Scores) -> Matches:
        """Match as in training: a token's matches do not depend on the other tokens."""
        return threshold_choice(scores, 0.0)

    def gate(self) -> Gate:
        """Return that all positive affinities are the code."""
        return Gate()

    def extra_losses(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the L1 penalty, and the loss that revives features if there is one."""
        weight, penalty = self.penalty_weight, sparsity_loss(matches, self.d_model)
        penalty = self.l1_coefficient * penalty if weight is None else weight(penalty)
        if self.l1_warmup_tokens:
            penalty = penalty * (self.history.tokens_seen / self.l1_warmup_tokens).clamp(max=1.0)
        return {"sparsity_loss": penalty} | super().extra_losses(scaled, matches, error)

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Move the weight of the penalty, if there is a k, by the matches that there were."""
        if self.penalty_weight is not None and self.history.tokens_seen > self.l1_warmup_tokens:
            fires = choice.matches.per_token().sum()
            self.penalty_weight.observe(fires, len(scores), self.layout.ranks)

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the weight of the penalty, if it is moved."""
        weight = self.penalty_weight
        return {} if weight is None else {"penalty_weight": weight.weight.clone()}
