"""TopK: Gao et al. 2024, https://arxiv.org/abs/2406.04093."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sae.allocation import Importance, Matches, Scores, token_choice
from lightning_sae.checks import UsageError, require_k, require_not_negative
from lightning_sae.core.losses import reconstruction_loss
from lightning_sae.sae import SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """Token choice: every token has the same budget of k matches.

    Defaults are the source's. Where it takes the geometric median of 32,768 tokens for `b_dec`, the
    mean of the first batch is taken here; its moving average of weights is left out.

    An SAE trained with one k reconstructs worse with more matches than k. With a
    `multi_k_coefficient`, for which the source has 1/8, it is trained to reconstruct with `multi_k`
    matches as well (Multi-TopK, appendix of the source), at some cost to k; its main runs do not.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Matches per token, 1 to n_features; fewer where fewer affinities are positive.
        aux_coefficient: Weight of the loss that revives dead features; 0 leaves it out.
        dying_below: Share of its Zipf density below which a feature counts as dying and is helped
            too (`aux_zipf_loss`); 0 helps dead ones alone (`aux_k_loss`).
        k_aux: Dead features a token may use in that loss, and an eighth as many dying ones.
            Default: d_model / 2.
        aux_every: One token in so many is used for that loss: 8, say, makes it cheap, and noisier.
            Tokens should come shuffled.
        multi_k_coefficient: Weight of a second reconstruction, with `multi_k` matches per token.
        multi_k: Matches per token in it, 1 to n_features. Default: 4 k. They do not count as
            firing.
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
        aux_coefficient: float = 1 / 32,
        dying_below: float = 0.0,
        k_aux: int | None = None,
        aux_every: int = 1,
        multi_k_coefficient: float = 0.0,
        multi_k: int | None = None,
        dead_after_tokens: int = 10_000_000,
        importance: Importance = "affinity",
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
        require_not_negative(multi_k_coefficient=multi_k_coefficient)
        multi_k = multi_k if multi_k is not None else 4 * k
        if multi_k_coefficient > 0 and not 1 <= multi_k <= n_features:
            raise UsageError(
                f"multi_k={multi_k} is out of range: it must be 1 to n_features={n_features}"
            )
        self.k = k
        self.multi_k_coefficient = multi_k_coefficient
        self.multi_k = multi_k

    def choose(self, scores: Scores) -> Matches:
        """Match every token with its k features of largest score."""
        return token_choice(scores, self.k)

    def choose_alone(self, scores: Scores) -> Matches:
        """Match as in training: a token's choice does not depend on the other tokens."""
        return self.choose(scores)

    def penalties(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the AuxK loss, and that of the reconstruction with more matches."""
        penalties = super().penalties(scaled, matches, error)
        if self.multi_k_coefficient == 0:
            return penalties
        chosen = token_choice(self.scores(scaled), self.multi_k)
        loss = reconstruction_loss(scaled - self.reconstruct(self.matches_of(scaled, chosen)))
        return penalties | {"multi_k_loss": self.multi_k_coefficient * loss}
