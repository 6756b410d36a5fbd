"""TopK: Gao et al. 2024, https://arxiv.org/abs/2406.04093."""

from typing import Any, get_args

from torch import Tensor

from lightning_sae.allocation import Choice, Importance, token_choice
from lightning_sae.checks import UsageError, require_choice, require_k, require_not_negative
from lightning_sae.core.gate import Gate, require_plain
from lightning_sae.core.input_scaling import NormalizeInputs
from lightning_sae.core.losses import reconstruction_loss
from lightning_sae.matches import Matches
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.selection import Scores


class TopKSAE(SparseAutoencoder):
    """Token choice: every token has the same budget of k matches.

    Defaults are the source's. Where it takes the geometric median of 32,768 tokens for `b_dec`, the
    mean of the first batch without massive tokens is taken here; its moving average of weights is
    Lightning's `EMAWeightAveraging`, if it is wanted.

    An SAE trained with one k reconstructs worse with more matches than k. With a
    `multi_k_coefficient`, for which the source has 1/8, it is trained to reconstruct with `multi_k`
    matches as well (Multi-TopK, appendix of the source), at some cost to k; its main runs do not.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Matches per token, 1 to n_features; fewer where fewer affinities are positive.
        multi_k_coefficient: Weight of a second reconstruction, with `multi_k` matches per token.
        multi_k: Matches per token in it, 1 to n_features. Default: 4 k. They do not count as
            firing.
        normalize_inputs: `lightning_sae.core.input_scaling.NormalizeInputs`.
        importance: What pairs are ranked by: `lightning_sae.allocation.Importance`.
        options: Those of `lightning_sae.SparseAutoencoder`.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        multi_k_coefficient: float = 0.0,
        multi_k: int | None = None,
        normalize_inputs: NormalizeInputs = "token",
        importance: Importance = "affinity",
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_features, normalize_inputs=normalize_inputs, **options)
        require_choice(importance=importance, of=get_args(Importance))
        require_k(k, n_features)
        require_not_negative(multi_k_coefficient=multi_k_coefficient)
        multi_k = multi_k if multi_k is not None else 4 * k
        if multi_k_coefficient > 0 and not 1 <= multi_k <= n_features:
            raise UsageError(
                f"multi_k={multi_k} is out of range: it must be 1 to n_features={n_features}"
            )
        self.k = k
        self.importance = importance
        self.multi_k_coefficient = multi_k_coefficient
        self.multi_k = multi_k

    def choose(self, scores: Scores) -> Choice:
        """Match every token with its k features of largest score."""
        return Choice(self.choose_per_token(scores))

    def choose_per_token(self, scores: Scores) -> Matches:
        """Match as in training: a token's choice does not depend on the other tokens."""
        return token_choice(scores, self.k)

    def gate(self) -> Gate:
        """Return that the k largest affinities are the code.

        Raises:
            UsageError: If pairs are ranked by something else than a multiple of the affinity.
        """
        require_plain(self.importance)
        return Gate(k=self.k)

    def extra_losses(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the AuxK loss, and that of the reconstruction with more matches."""
        losses = super().extra_losses(scaled, matches, error)
        if self.multi_k_coefficient == 0:
            return losses
        chosen = token_choice(self.scores(scaled), self.multi_k)
        loss = reconstruction_loss(scaled - self.reconstruct(self.matches_of(scaled, chosen)))
        return losses | {"multi_k_loss": self.multi_k_coefficient * loss}
