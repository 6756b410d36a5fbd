"""The base of every architecture: codes, loss, steps and the state that outlives a step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any, Self, get_args

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_sae.allocation import Importance, Matches, Scores, score, token_choice
from lightning_sae.checks import (
    UsageError,
    require_choice,
    require_not_negative,
    require_positive,
    require_share,
)
from lightning_sae.core.dictionary import Dictionary, wide
from lightning_sae.core.losses import aux_zipf_loss, reconstruction_loss
from lightning_sae.metrics import (
    L0,
    DeadFeatures,
    FeatureDensity,
    FractionOfVarianceUnexplained,
    L0StandardDeviation,
    zipf_statistics,
)
from lightning_sae.optim.chunked_adam import ChunkedAdam
from lightning_sae.parallel.legacy import (
    different_tokens_in,
    from_first_rank,
    mean_over_ranks,
    sum_over_ranks,
    world_size,
)
from lightning_sae.parallel.share import local
from lightning_sae.sparse import EncoderScores, give_whole
from lightning_sae.zipf import ZipfFitError, zipf_deficit

_SHARED_BUFFERS = (
    "input_mean",
    "input_scale",
    "initialized",
    "tokens_seen",
    "tokens_since_fired",
    "density",
)


class SparseAutoencoder(Dictionary, ABC):
    """A dictionary of features that explains each activation by a few of them.

    A subclass says in `choose` which token-feature pairs are matches, from scores that rank them:
    their affinities, or another measure of `importance`. The affinities of the matches are the
    codes; all others are zero.

    In `train()` mode matches are chosen over the batch, and `loss` also keeps the state that
    outlives a step up to date, as batch normalisation does: the first batch sets `b_dec` to its
    mean and the scale so that a centred token has a mean squared length of d_model; every batch
    updates thresholds and firing counters. In `eval()` mode a token's code depends on that token
    alone, and nothing changes.

    `forward`, `encode`, `decode` and `loss` need no Trainer, so a module can be trained in a plain
    loop or as a child of another LightningModule. There, call `normalize_decoder` after each
    optimizer step, as the Trainer does here.

    Attributes:
        tokens_seen: Tokens trained on, over all ranks, int64, 0-d.
        tokens_since_fired: For each feature, tokens since its last match, int64, (n_features,).
        density: For each feature, the share of tokens it was matched with, over about the last
            `dead_after_tokens` tokens, float32, (n_features,).
    """

    tokens_seen: Tensor
    tokens_since_fired: Tensor
    density: Tensor

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        aux_coefficient: float = 1 / 32,
        dying_below: float = 0.0,
        k_aux: int | None = None,
        aux_every: int = 1,
        dead_after_tokens: int = 10_000_000,
        importance: Importance = "affinity",
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(d_model, n_features)
        k_aux = k_aux if k_aux is not None else max(1, d_model // 2)
        require_positive(k_aux=k_aux, aux_every=aux_every, dead_after_tokens=dead_after_tokens)
        require_not_negative(aux_coefficient=aux_coefficient)
        require_share(dying_below=dying_below)
        require_choice(importance=importance, of=get_args(Importance))
        # Primitives only: checkpoints with classes among their hyperparameters do not load safely.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.aux_coefficient = aux_coefficient
        self.dying_below = dying_below
        self.k_aux = k_aux
        self.aux_every = aux_every
        self.dead_after_tokens = dead_after_tokens
        self.importance = importance
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

        self.register_buffer("tokens_seen", torch.tensor(0))
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64))
        self.register_buffer("density", torch.zeros(n_features, dtype=torch.float32))

        self.fvu = FractionOfVarianceUnexplained(d_model)
        self.l0 = L0()
        self.l0_std = L0StandardDeviation()
        self.feature_density = FeatureDensity(n_features)
        self.dead_features = DeadFeatures(n_features)

    # What an architecture decides

    @abstractmethod
    def choose(self, scores: Scores) -> Matches:
        """Choose the matches of a training batch by their scores, which become their values."""

    @abstractmethod
    def choose_alone(self, scores: Scores) -> Matches:
        """Choose each token's matches without regard to the other tokens of the batch."""

    def penalties(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms added to the reconstruction loss in training, by name.

        By default the loss by which dead and dying features learn to explain the remaining error.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
            matches: The matches chosen for them.
            error: `scaled` less its reconstruction, shape (tokens, d_model).
        """
        if self.aux_coefficient == 0:
            return {}
        dead, deficit = self.dead_features_mask(), self.deficit()
        dying = ~dead & (deficit > 1 - self.dying_below)
        scaled, error = scaled[:: self.aux_every], error[:: self.aux_every]
        loss = aux_zipf_loss(
            error,
            self._modelled_by(dead, dead.float(), scaled, self.k_aux),
            self._modelled_by(dying, deficit, scaled, max(1, self.k_aux // 8)),
            self.dying_below,
        )
        name = "aux_zipf_loss" if self.dying_below else "aux_k_loss"
        return {name: self.aux_coefficient * loss}

    def _modelled_by(self, mask: Tensor, weights: Tensor, scaled: Tensor, k: int) -> Tensor | None:
        """Return what each token's k of some features, of largest weighted affinity, add up to."""
        features = mask.nonzero().squeeze(1)
        if not len(features):
            return None
        with torch.no_grad():
            share, own = self.share.among(features)
            weight, bias = (each[own] for each in self._encoder())  # copies
            factor = weights[features].to(bias)
            here = factor[share.here]
            weight.mul_(here.unsqueeze(1))
            centred = scaled - wide(self.b_dec)
            scores = EncoderScores(centred, weight, bias * here, share=share)
            chosen = token_choice(scores, min(k, len(features)))
            chosen = Matches(
                chosen.token,
                features[chosen.feature],
                chosen.value / factor[chosen.feature],
                (len(scaled), self.n_features),
            )
        matches = self.with_gradient(scaled, chosen)
        weighted = weights.to(matches.value)[matches.feature]
        return self.sum_directions(matches.with_values(matches.value * weighted))

    def observe(self, scores: Scores, chosen: Matches) -> None:
        """Update the architecture's own state, thresholds say, from a training batch.

        Args:
            scores: What `choose` was given.
            chosen: What it returned: matches whose values are their scores.
        """

    # Codes

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of activations (..., d_model), in the same shape."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense codes, shape (..., n_features), of activations (..., d_model).

        Raises:
            ValueError: If the last dimension of x is not d_model.
            RuntimeError: In `eval()` mode before thresholds were learned.
        """
        codes = self.match(x.reshape(-1, x.shape[-1])).to_dense()
        return codes.view(*x.shape[:-1], self.n_features)

    def match(self, x: Tensor) -> Matches:
        """Return the matches of activations (tokens, d_model): `encode` without the zeros."""
        return self._match(self.scaled(x))[0]

    def _match(self, scaled: Tensor) -> tuple[Matches, Scores, Matches]:
        """Return matches, the scores of all pairs, and the matches with their scores as values."""
        scores = self.scores(scaled)
        with torch.no_grad():
            try:
                chosen = self.choose(scores) if self.training else self.choose_alone(scores)
            except FloatingPointError:
                raise UsageError(
                    f"affinities are not finite after {self.tokens_seen.item()} tokens: "
                    "lower the learning rate, or look for NaN or infinite activations"
                ) from None
        return self.matches_of(scaled, chosen), scores, chosen

    def matches_of(self, scaled: Tensor, chosen: Matches) -> Matches:
        """Return matches that were chosen by their scores with their affinities and gradient.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
            chosen: What a choice from `scores(scaled)` returned.
        """
        if self.importance != "affinity":
            chosen = chosen.with_values(self.affinities_of(scaled, chosen))
        return self.with_gradient(scaled, chosen)

    def scores(self, scaled: Tensor) -> Scores:
        """Return what pairs are ranked by: affinities, or another measure of `importance`.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
        """
        centred = scaled.detach() - wide(self.b_dec.detach())
        if self.importance == "affinity":
            return EncoderScores(centred, *self._encoder(), share=self.share)
        if self.importance == "token_norm":  # a factor for each token
            ones = centred.new_ones(len(centred), 1)
            scale = score(ones, self.importance, centred=centred, dictionary=local(self.W_dec))
            return EncoderScores(
                centred, *self._encoder(), scale=scale.squeeze(1), share=self.share
            )

        def rank(affinities: Tensor, tokens: slice, features: slice) -> Tensor:
            dictionary = wide(local(self.W_dec)[features])
            return score(
                affinities, self.importance, centred=centred[tokens], dictionary=dictionary
            )

        return EncoderScores(centred, *self._encoder(), rank=rank, share=self.share)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a trained SAE as Lightning does, running nothing that the file or URL may hold.

        In Lightning 2.6.6 a checkpoint can name functions to call in place of an optimizer, also
        one loaded with `weights_only=True`; `LightningModule.load_from_checkpoint` calls them.
        """
        safe = {"weights_only": True, "_instantiator": None}
        return super().load_from_checkpoint(checkpoint_path, *args, **(kwargs | safe))

    # Training

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and the figures worth logging.

        In `train()` mode this also updates the buffers, on every rank alike.

        Args:
            x: Activations, shape (..., d_model).

        Returns:
            The loss, 0-d with gradient, and a dictionary of detached 0-d tensors: each term of the
            loss, `l0` (matches per token) and its spread `l0_std`, `fvu`, `dead_fraction`, and
            `threshold` where there is one.

        Raises:
            ValueError: If x is not d_model wide, or its affinities are not finite.
        """
        x = x.reshape(-1, x.shape[-1])
        if self.training and not self.initialized:
            self.initialize(x)
        scaled = self.scaled(x)
        with self.one_gradient() as gradients:
            matches, scores, chosen = self._match(scaled)
            error = scaled - self.reconstruct(matches)
            terms = {"reconstruction_loss": reconstruction_loss(error)}
            if self.training:
                terms |= self.penalties(scaled, matches, error)
        loss = gradients.forget_before(torch.stack(list(terms.values())).sum())
        if self.training:
            self._observe(scores, chosen)
        stats = {"loss": loss, **terms, **self._batch_statistics(scaled, error, matches)}
        return loss, {name: value.detach() for name, value in stats.items()}

    def dead_features_mask(self) -> Tensor:
        """Return which features have not fired for `dead_after_tokens`, bool, (n_features,)."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def deficit(self) -> Tensor:
        """Return by which share each feature falls short of its Zipf density, (n_features,).

        Zero for all while nothing is known: if dying features get no help, before the first
        batches, or when too few features are live.
        """
        tokens = min(int(self.tokens_seen), self.dead_after_tokens)
        if self.dying_below and tokens:
            with suppress(ZipfFitError):
                return zipf_deficit(self.density, tokens)
        return torch.zeros_like(self.density)

    @torch.no_grad()
    def _observe(self, scores: Scores, chosen: Matches) -> None:
        counts = torch.cat([chosen.per_feature(), self.tokens_seen.new_tensor([len(scores)])])
        fires, tokens = sum_over_ranks(counts).split([self.n_features, 1])
        tokens = tokens.squeeze()
        self.tokens_seen += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fires > 0, 0)
        # The mean over all tokens until there are dead_after_tokens of them, then a running one.
        window = self.tokens_seen.clamp(max=self.dead_after_tokens).maximum(tokens)
        # Quotients of integers would have the default dtype, which may have 16 bits.
        self.density.lerp_(fires.float() / tokens, tokens.float() / window)
        self.observe(scores, chosen)

    @torch.no_grad()
    def _batch_statistics(
        self, scaled: Tensor, error: Tensor, matches: Matches
    ) -> dict[str, Tensor]:
        per_token = matches.per_token().float()
        variance = (scaled - scaled.mean(0)).square().sum()
        return {
            "l0": per_token.mean(),
            "l0_std": per_token.std(correction=0),
            "fvu": error.square().sum() / variance,
            "dead_fraction": self.dead_features_mask().float().mean(),
            **self.threshold_statistics(),
        }

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return what there is to log about the thresholds used in `eval()` mode."""
        return {}

    def load_dictionary(self, path: str) -> None:
        """Take over parameters, scale and counters from a checkpoint of any architecture.

        Args:
            path: A checkpoint of an SAE of the same shape.

        Raises:
            ValueError: If it is none.
        """
        try:
            found = torch.load(path, map_location=self.device, weights_only=True)["state_dict"]
            wanted = dict(self.named_parameters())
            wanted |= {name: getattr(self, name) for name in _SHARED_BUFFERS}
            with torch.no_grad():
                for name, tensor in wanted.items():
                    tensor.copy_(found[name])
        except (KeyError, RuntimeError, OSError, EOFError, UnpicklingError) as error:
            raise UsageError(
                f"{path} is no checkpoint of an SAE with d_model={self.d_model}, "
                f"n_features={self.n_features}: {error}"
            ) from error

    # The Trainer's steps: they log what `loss` and the metrics return, and decide nothing

    def configure_model(self) -> None:
        """Share out the features over the devices if the strategy is a `ModelParallelStrategy`.

        Its `tensor_parallel_size` devices each have a share of the features and the same tokens;
        `data_parallel_size` such groups have different tokens.

        Raises:
            ValueError: If there are more devices than features.
        """
        if self.device_mesh is None:
            return
        different_tokens_in(self.device_mesh["data_parallel"].get_group())
        self.share_out(self.device_mesh["tensor_parallel"])

    def on_fit_start(self) -> None:
        """Start from the same weights in all groups of devices that share out the features."""
        if self.share.mesh is not None:
            for parameter in self.parameters():
                from_first_rank(local(parameter.data))

    def on_after_backward(self) -> None:
        """Average gradients over groups of devices that share out the features: no one else does.

        Those of an earlier batch, if they accumulate, are equal and stay as they are.
        """
        if self.share.mesh is not None and world_size() > 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    gradient = local(parameter.grad)
                    gradient.copy_(mean_over_ranks(gradient))

    def teardown(self, stage: str) -> None:
        """Leave other models of this process to their own strategies."""
        different_tokens_in(None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of activations and log its parts under ``train/``."""
        loss, stats = self.loss(activations_in(batch))
        shown = {"loss", "l0", "dead_fraction"}
        for name, value in stats.items():
            self.log(f"train/{name}", value, prog_bar=name in shown)
        self.log("train/tokens", self.tokens_seen.float())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics with a batch of held-out activations."""
        if not self.trainer.sanity_checking:  # before the first step there is nothing to measure
            self._measure(activations_in(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics with a batch of held-out activations."""
        self._measure(activations_in(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Matches:
        """Return the matches of a batch of activations."""
        return self.match(activations_in(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under ``val/``."""
        if not self.trainer.sanity_checking:
            self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics under ``test/``."""
        self._log_metrics("test")

    def _measure(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        matches = self.match(x)
        self.fvu.update(self.reconstruct(matches) / self.input_scale, x)
        for metric in (self.l0, self.l0_std, self.feature_density, self.dead_features):
            metric.update(matches)

    def _log_metrics(self, stage: str) -> None:
        tokens = sum_over_ranks(self.feature_density.tokens)  # what compute() below is over
        figures = {
            "fvu": self.fvu.compute(),
            "l0": self.l0.compute(),
            "l0_std": self.l0_std.compute(),
            "dead_fraction": self.dead_features.compute(),
            **zipf_statistics(self.feature_density.compute(), int(tokens)),
            "tokens": tokens,
            **self.threshold_statistics(),
        }
        for name, value in figures.items():
            self.log(f"{stage}/{name}", value.float())
        for metric in (self.fvu, self.l0, self.l0_std, self.feature_density, self.dead_features):
            metric.reset()

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped every batch: a stream has no epochs.

        Without a schedule of the user's the learning rate falls linearly to zero over the run, or
        stays as it is if the run has no set number of steps.
        """
        for parameter in self.parameters():
            give_whole(parameter)  # an earlier optimizer may have wanted it in parts
        with _refusals_of("optimizer", ValueError, RuntimeError):
            optimizer = self._optimizer(self.parameters())
        if isinstance(optimizer, ChunkedAdam):
            self._require_all_tokens()
        steps = self.trainer.estimated_stepping_batches
        if self._lr_scheduler is not None:
            with _refusals_of("lr_scheduler", ValueError, ZeroDivisionError):
                scheduler = self._lr_scheduler(optimizer)
        elif math.isfinite(steps):
            # Not LinearLR: a run resumed with more steps than before could not leave its zero.
            scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        else:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; a length that torch finds out about only now was the user's mistake.

        Raises:
            UsageError: If it cannot: its length is 0, say, or the run is longer.
        """
        name = f"lr_scheduler={type(scheduler).__name__}"
        empty = f"{name} has a length of 0"
        with _refusals_of(name, ValueError), _refusals_of(empty, ZeroDivisionError):
            super().lr_scheduler_step(scheduler, metric)

    def _require_all_tokens(self) -> None:
        # Neither data parallelism nor a gradient scaler sees gradients in parts.
        devices, precision = self.trainer.world_size, self.trainer.precision
        if devices > len(self.share.sizes) or precision == "16-mixed":
            raise UsageError(
                f"optimizer=ChunkedAdam is for one device, or data_parallel_size=1, and no 16-mixed"
                f" precision, not for devices={devices}, precision={precision}: use "
                "torch.optim.Adam"
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the Trainer is set to, those that are in parts too.

        Raises:
            ValueError: If they are in parts and are to be clipped by value.
        """
        if not gradient_clip_val:
            return
        precision = self.trainer.precision_plugin
        if isinstance(optimizer, ChunkedAdam):
            if gradient_clip_algorithm == "value":
                raise UsageError("gradient_clip_algorithm=value: ChunkedAdam clips by norm only")
            optimizer.clip_grad_norm(gradient_clip_val)
        elif isinstance(precision, MixedPrecision) and optimizer.defaults.get("fused"):
            # Lightning refuses, because such an optimizer unscales gradients itself; it does not
            # if they are unscaled already.
            if precision.scaler is not None:
                precision.scaler.unscale_(optimizer)
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(precision, optimizer, gradient_clip_val, algorithm)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then restore the unit norm: before any callback can write a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.normalize_decoder()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the architecture, so that a checkpoint of another one is told apart."""
        checkpoint["architecture"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or shape.

        Raises:
            ValueError: If it is one; the message names both.
        """
        # A ModelParallelStrategy has loaded the weights by now, and taken them out.
        features, width = checkpoint.get("state_dict", self.state_dict())["W_dec"].shape
        name = checkpoint.get("architecture", "an unnamed architecture")
        found = f"{name}(d_model={width}, n_features={features})"
        expected = f"{type(self).__name__}(d_model={self.d_model}, n_features={self.n_features})"
        if found != expected:
            raise UsageError(f"the checkpoint holds {found}, the configuration asks for {expected}")


@contextmanager
def _refusals_of(setting: str, *kinds: type[Exception]) -> Iterator[None]:
    """Make a mistake of the user of what torch raises about a setting."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(f"{setting}: {error}") from error


def activations_in(batch: Any) -> Tensor:
    """Return the activations in a batch: a tensor, a mapping, or what a TensorDataset yields."""
    if isinstance(batch, Mapping):
        batch = batch["activations"]
    if isinstance(batch, Sequence):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(f"a batch must hold a tensor of activations, not {type(batch).__name__}")
    return batch
