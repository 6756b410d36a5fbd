"""What every SAE does with a batch: choose matches, reconstruct, and say how badly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_sae.allocation import Choice, Importance, score
from lightning_sae.checks import UsageError
from lightning_sae.core.batch_statistics import batch_statistics, require_new_names
from lightning_sae.core.firing_history import FiringHistory
from lightning_sae.core.input_scaling import NormalizeInputs
from lightning_sae.core.losses import reconstruction_loss
from lightning_sae.core.nested import NestedDictionary
from lightning_sae.core.ordinary_tokens import MASSIVE, is_massive
from lightning_sae.core.revival import Revival
from lightning_sae.host_copy import HostCopy
from lightning_sae.matches import Matches
from lightning_sae.numerics import typed_as, wide
from lightning_sae.parallel import local
from lightning_sae.selection import Scores
from lightning_sae.sparse import EncoderScores
from lightning_sae.uncompiled import uncompiled

__all__ = ["Autoencoder"]


class Autoencoder(NestedDictionary, ABC):
    """A dictionary of features that explains each activation by a few of them.

    A subclass says in `choose` which token-feature pairs of a training batch are matches, and in
    `choose_per_token` which those of a token by itself are, from scores that rank pairs: their
    affinities, or another measure of `importance`. The affinities of matches are the codes; all
    others are zero.

    `forward`, `encode` and `match` are inference, in `train()` mode too: a token's code depends on
    that token alone, and nothing changes. Only `loss` chooses over the batch. In `train()` mode it
    also keeps the state that outlives a step up to date, as batch normalisation does: the first
    batch sets origin and scale (`lightning_sae.core.input_scaling`); every batch updates thresholds
    and the firing history.

    Activations of any floating-point type are taken, and what comes out has the type that went in.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        normalize_inputs: `lightning_sae.core.input_scaling.NormalizeInputs`.
        aux_coefficient: Weight of the loss that revives dead features; 0 leaves it out.
        dying_below: Share of its Zipf density below which a feature counts as dying and is helped
            too (`aux_zipf_loss`); 0 helps dead ones alone (`aux_k_loss`).
        k_aux: Dead features a token may use in that loss, and an eighth as many dying ones.
            Default: d_model / 2.
        aux_every: One token in so many is used for that loss: 8, say, makes it cheap, and noisier.
            Tokens should come shuffled.
        dead_after_tokens: Tokens without a match after which a feature counts as dead.
        max_norm_multiple: Tokens more than so many times as far from the first batch's mean as is
            typical are left out of training. Default: none are. A language model may need them:
            what is left out is not learned.
        prefixes: Sizes of smaller dictionaries, of the first features, that are to reconstruct too
            (Matryoshka): `lightning_sae.core.nested`. The reconstruction loss is the mean of all.

    Attributes:
        history: When each feature fired last, and how often it does.
        revival: The auxiliary loss.
        importance: What pairs are ranked by; a subclass that chooses may set it.

    Raises:
        ValueError: If a size is out of range.
    """

    importance: Importance = "affinity"

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        normalize_inputs: NormalizeInputs = "average",
        aux_coefficient: float = 1 / 32,
        dying_below: float = 0.0,
        k_aux: int | None = None,
        aux_every: int = 1,
        dead_after_tokens: int = 10_000_000,
        max_norm_multiple: float | None = None,
        prefixes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(d_model, n_features, normalize_inputs, prefixes)
        if max_norm_multiple is not None and not max_norm_multiple > 1:
            raise UsageError(f"max_norm_multiple={max_norm_multiple} must be more than 1")
        self.max_norm_multiple = max_norm_multiple
        k_aux = k_aux if k_aux is not None else max(1, d_model // 2)
        self.revival = Revival(aux_coefficient, dying_below, k_aux, aux_every)
        self._initialized = HostCopy()
        self.history = FiringHistory(n_features, dead_after_tokens)

    @property
    def tokens_seen(self) -> Tensor:
        """Tokens trained on, over all ranks, int64, 0-d."""
        return self.history.tokens_seen

    # What an architecture decides

    @abstractmethod
    def choose(self, scores: Scores) -> Choice:
        """Choose the matches of a training batch by their scores, which become their values."""

    @abstractmethod
    def choose_per_token(self, scores: Scores) -> Matches:
        """Choose each token's matches without regard to the other tokens of the batch."""

    def prepare(self, x: Tensor) -> None:
        """Turn what a schedule turns, before a batch (tokens, d_model) is chosen from."""
        if not self._initialized.of(self.initialized) and self.layout.ranks.count(x, x.device):
            self.initialize(x)

    def share_is_over(self, share: float) -> bool | None:
        """Return whether a share of the run is over; None where nobody knows how long it will be.

        Args:
            share: From 0 to 1.
        """
        return None

    def extra_losses(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms added to the reconstruction loss in training, by name.

        By default the loss by which dead and dying features learn to explain the remaining error. A
        term named `reconstruction_loss` takes the place of the squared error.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
            matches: The matches chosen for them.
            error: `scaled` less its reconstruction, shape (tokens, d_model).
        """
        return self.revival.loss(self, self.history, scaled, error)

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Update the architecture's own state, thresholds say, from a training batch.

        Args:
            scores: What `choose` was given.
            choice: What it returned: matches whose values are their scores.
        """

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return what there is to log about the thresholds of inference."""
        return {}

    # Inference

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of activations (..., d_model), in the same shape and dtype.

        Raises:
            ValueError: If x is not d_model wide, or before thresholds were learned.
        """
        scaled = self.reconstruct(self.match(x.reshape(-1, x.shape[-1]))).view(x.shape)
        return typed_as(scaled / self.scales(x), x)

    @uncompiled
    def encode(self, x: Tensor) -> Tensor:
        """Return the dense codes, shape (..., n_features), of activations (..., d_model).

        In the dtype of the activations. Raises as `forward` does.
        """
        codes = self.match(x.reshape(-1, x.shape[-1])).to_dense()
        return typed_as(codes, x).view(*x.shape[:-1], self.n_features)

    @uncompiled
    def match(self, x: Tensor) -> Matches:
        """Return the matches of activations (tokens, d_model): `encode` without the zeros.

        Their values are in float32, or in float64 if the parameters are. Raises as `forward` does,
        and if activations have more than two dimensions.
        """
        if x.dim() != 2:
            raise UsageError(f"match takes (tokens, d_model), not activations of {tuple(x.shape)}")
        scaled = self.scaled(x)
        with self._choosing():
            chosen = self.choose_per_token(self.scores(scaled))
        return self.matches_of(scaled, chosen)

    # Training

    def ordinary(self, x: Tensor) -> Tensor:
        """Return those of some activations (tokens, d_model) that training does not leave out."""
        if self.max_norm_multiple is None or not self._initialized.of(self.initialized):
            return x
        self._check_width(x)
        return x[~self._massive(x)]

    @uncompiled
    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and the figures worth logging.

        In `train()` mode matches are chosen over the batch, and buffers are updated, on every rank
        alike; in `eval()` mode each token's are chosen by itself.

        Args:
            x: Activations, shape (..., d_model).

        Returns:
            The loss, 0-d with gradient, and a dictionary of detached 0-d tensors: each term of the
            loss, `l0` (matches per token) and its spread `l0_std`, `fvu`, `dead_fraction`,
            `massive_fraction`, and `threshold` where there is one. In `train()` mode they are those
            of all ranks' tokens. The loss itself is this rank's, with a weight by its tokens, so
            that the mean over ranks of its gradient is that of all tokens, however they are shared.

        Raises:
            ValueError: If x is not d_model wide, or its affinities are not finite.
        """
        x = x.reshape(-1, x.shape[-1])
        if self.training:
            self.prepare(x)
        massive = self._massive(x)
        leave_out = self.training and self.max_norm_multiple is not None
        x = x[~massive] if leave_out else x
        scaled = self.scaled(x)
        whole, target = self.targets(x, scaled)
        scores = self.scores(scaled)
        with self._choosing():
            choice = self.choose(scores) if self.training else Choice(self.choose_per_token(scores))
        matches = self.matches_of(scaled, choice.matches)
        *_, error = errors = self.errors(target, matches)
        mean = torch.stack([reconstruction_loss(each) for each in errors]).mean()
        terms = {"reconstruction_loss": mean}
        if self.training:
            terms |= (extra := self.extra_losses(scaled, matches, error))
            require_new_names(extra, of=self)
        loss = torch.stack(list(terms.values())).sum()
        means = {"loss": loss, **terms, "massive_fraction": massive.sum() / max(1, len(scaled))}
        ranks = self.layout.ranks if self.training else None
        stats = batch_statistics(means, matches, whole, error, ranks)
        if leave_out:  # so far for each token that is left
            stats["massive_fraction"] /= 1 + stats["massive_fraction"]
        if ranks is not None:
            with torch.no_grad():
                total = self.history.update(matches.per_feature(), len(scaled), ranks)
                self.observe(scores, choice)
                self.revival.send(self.history)
            if ranks.size > 1:  # what each token weighs, where ranks have other numbers of them
                own = total.new_full((), len(scaled) * ranks.size)
                loss = loss * (own / total.clamp_min(1)).to(loss)
        stats["dead_fraction"] = self.history.dead().float().mean()
        stats |= self.threshold_statistics()
        return loss, {name: value.detach() for name, value in stats.items()}

    def scores(self, scaled: Tensor) -> Scores:
        """Return what pairs are ranked by: affinities, or another measure of `importance`.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
        """
        share = self.layout.share
        weight, bias, origin = self._encoder()
        centred = scaled.detach() - origin.detach()
        if self.importance == "affinity":
            return EncoderScores(centred, weight, bias, share=share)
        dictionary = local(self.decoder.weight.detach())
        if self.importance == "token_norm":  # a factor for each token
            ones = centred.new_ones(len(centred), 1)
            scale = score(ones, self.importance, centred=centred, dictionary=dictionary)
            return EncoderScores(centred, weight, bias, scale=scale.squeeze(1), share=share)

        def rank(affinities: Tensor, tokens: slice, features: slice) -> Tensor:
            rows = wide(dictionary[features])
            return score(affinities, self.importance, centred=centred[tokens], dictionary=rows)

        return EncoderScores(centred, weight, bias, rank=rank, share=share)

    def matches_of(self, scaled: Tensor, chosen: Matches) -> Matches:
        """Return matches that were chosen by their scores with their affinities and gradient.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
            chosen: What a choice from `scores(scaled)` returned.
        """
        if self.importance != "affinity":
            chosen = chosen.with_values(self.affinities_of(scaled, chosen))
        return self.with_gradient(scaled, chosen)

    def _massive(self, x: Tensor) -> Tensor:
        centred = (x - self.input_mean) * self.input_scale
        return is_massive(centred, self.max_norm_multiple or MASSIVE)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        try:
            with torch.no_grad():
                yield
        except FloatingPointError:
            raise UsageError(
                f"affinities are not finite after {self.history.tokens_seen.item()} tokens: "
                "lower the learning rate, or look for NaN or infinite activations"
            ) from None
