"""The base of every architecture: parameters, codes, steps and the state that outlives a step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_sae.allocation import Matches
from lightning_sae.checks import require_not_negative, require_positive
from lightning_sae.distributed import max_over_ranks, sum_over_ranks
from lightning_sae.losses import aux_k_loss, reconstruction_loss
from lightning_sae.metrics import (
    L0,
    DeadFeatures,
    FeatureDensity,
    FractionOfVarianceUnexplained,
    L0StandardDeviation,
)
from lightning_sae.metrics.base import widest_float
from lightning_sae.sparse import weighted_sum
from lightning_sae.zipf import dying_fraction


class SparseAutoencoder(pl.LightningModule, ABC):
    """A dictionary of features that explains each activation by a few of them.

    With x the activations of a batch and s the input scale, the affinities of its tokens with the
    features are ``z' = (s x - b_dec) W_enc^T + b_enc``. A subclass says in `choose` which
    token-feature pairs are matches; their values z are the codes, and the reconstruction is
    ``(z W_dec + b_dec) / s``.

    In `train()` mode matches are chosen over the batch, and `loss` also keeps the state that
    outlives a step up to date, as batch normalisation does: the first batch sets `b_dec` to its
    mean and the scale so that a centred token has a mean squared length of d_model; every batch
    updates thresholds and firing counters. In `eval()` mode a token's code depends on that token
    alone, and nothing changes.

    `forward`, `encode`, `decode` and `loss` need no Trainer, so a module can be trained in a plain
    loop or as a child of another LightningModule. There, call `normalize_decoder` after each
    optimizer step, as the Trainer does here.

    Attributes:
        encoder: Linear map from activations to affinities, weight of shape (n_features, d_model).
        W_dec: Dictionary, one unit-norm row a feature, shape (n_features, d_model).
        b_dec: Origin of the codes in scaled activations, shape (d_model,).
        input_mean: Mean of the first training batch, in the units of the activations, (d_model,).
        input_scale: Factor s applied to activations before they are encoded, 0-d.
        initialized: Whether mean, scale and `b_dec` have been set, bool, 0-d.
        tokens_seen: Tokens trained on, over all ranks, int64, 0-d.
        tokens_since_fired: For each feature, tokens since its last match, int64, (n_features,).
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        aux_k_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after_tokens: int = 10_000_000,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        k_aux = k_aux if k_aux is not None else max(1, d_model // 2)
        require_positive(d_model=d_model, n_features=n_features, k_aux=k_aux)
        require_positive(dead_after_tokens=dead_after_tokens)
        require_not_negative(aux_k_coefficient=aux_k_coefficient)
        # Primitives only: checkpoints with classes among their hyperparameters do not load safely.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.d_model = d_model
        self.n_features = n_features
        self.aux_k_coefficient = aux_k_coefficient
        self.k_aux = k_aux
        self.dead_after_tokens = dead_after_tokens
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

        directions = functional.normalize(torch.randn(n_features, d_model), dim=1)
        self.encoder = nn.Linear(d_model, n_features)
        self.encoder.weight.data.copy_(
            directions
        )  # tied at the start: Gao et al. 2024, section 2.4
        self.encoder.bias.data.zero_()
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        # float32 also where the default is a 16-bit type
        self.register_buffer("input_mean", torch.zeros(d_model, dtype=torch.float32))
        self.register_buffer("input_scale", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("tokens_seen", torch.tensor(0))
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64))
        self.input_mean: Tensor
        self.input_scale: Tensor
        self.initialized: Tensor
        self.tokens_seen: Tensor
        self.tokens_since_fired: Tensor

        self.fvu = FractionOfVarianceUnexplained(d_model)
        self.l0 = L0()
        self.l0_std = L0StandardDeviation()
        self.feature_density = FeatureDensity(n_features)
        self.dead_features = DeadFeatures(n_features)

    # What an architecture decides

    @abstractmethod
    def choose(self, affinities: Tensor) -> Matches:
        """Choose the matches of a training batch from its affinities (tokens, n_features)."""

    @abstractmethod
    def choose_alone(self, affinities: Tensor) -> Matches:
        """Choose each token's matches without regard to the other tokens of the batch."""

    def penalties(self, affinities: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms added to the reconstruction loss in training, by name.

        By default the loss by which dead features learn to explain the remaining error.

        Args:
            affinities: Shape (tokens, n_features).
            matches: The matches chosen from them.
            error: Scaled activations less their reconstruction, shape (tokens, d_model).
        """
        if self.aux_k_coefficient == 0:
            return {}
        dead = self.dead_features_mask().nonzero().squeeze(1)
        loss = aux_k_loss(affinities[:, dead], error, _unit_rows(self.W_dec[dead]), self.k_aux)
        return {"aux_k_loss": self.aux_k_coefficient * loss}

    def observe(self, affinities: Tensor, matches: Matches) -> None:
        """Update the architecture's own state, thresholds say, from a training batch."""

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
        affinities = self.affinities(self._scale(x))
        return self.choose(affinities) if self.training else self.choose_alone(affinities)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the activations (..., d_model) that codes (..., n_features) stand for."""
        with torch.autocast(codes.device.type, enabled=False):
            dictionary = self._dictionary()
            scaled = codes.to(dictionary.dtype) @ dictionary + self.b_dec.to(dictionary.dtype)
            return scaled / self.input_scale

    def affinities(self, scaled: Tensor) -> Tensor:
        """Return the affinities (tokens, n_features) of scaled activations (tokens, d_model).

        In float32 or wider under every precision, because 16-bit affinities tie too often for a
        choice between them to mean anything.
        """
        with torch.autocast(scaled.device.type, enabled=False):
            wide = torch.promote_types(self.encoder.weight.dtype, torch.float32)
            centred = scaled.to(wide) - self.b_dec.to(wide)
            weight, bias = self.encoder.weight.to(wide), self.encoder.bias.to(wide)
            return functional.linear(centred, weight, bias)

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
        scaled = self._scale(x)
        affinities = self.affinities(scaled)
        if not bool(affinities.sum().isfinite()):  # else a NaN would just never be chosen
            raise ValueError(
                f"affinities are not finite after {self.tokens_seen.item()} tokens: "
                "lower the learning rate, or look for NaN or infinite activations"
            )
        matches = self.choose(affinities) if self.training else self.choose_alone(affinities)
        error = scaled - self._reconstruct(matches)
        terms = {"reconstruction_loss": reconstruction_loss(error)}
        if self.training:
            terms |= self.penalties(affinities, matches, error)
            self._observe(affinities.detach(), matches)
        loss = torch.stack(list(terms.values())).sum()
        stats = {"loss": loss, **terms, **self._batch_statistics(scaled, error, matches)}
        return loss, {name: value.detach() for name, value in stats.items()}

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set `b_dec`, `input_mean` and `input_scale` from activations (tokens, d_model).

        `loss` does so with the first training batch; call it before for a larger sample. Under
        data parallelism the sample is that of all ranks.

        Raises:
            ValueError: If all activations are equal, not finite, or not d_model wide.
        """
        self._check_width(x)
        x = x.detach().to(widest_float(x.device))
        count = sum_over_ranks(x.new_tensor(x.shape[0]))
        mean = sum_over_ranks(x.sum(0)) / count
        variance = sum_over_ranks((x - mean).square().sum()) / count  # squared length of a token
        if not bool(variance.isfinite()) or not bool(variance > 0):
            raise ValueError(
                f"activations with variance {variance.item()} cannot be scaled: "
                "they must be finite and not all the same"
            )
        scale = (self.d_model / variance).sqrt()
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale)
        self.b_dec.copy_(mean * scale)
        self.initialized.fill_(True)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every row of `W_dec` unit norm again. Call it after each optimizer step."""
        self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    def dead_features_mask(self) -> Tensor:
        """Return which features have not fired for `dead_after_tokens`, bool, (n_features,)."""
        return self.tokens_since_fired >= self.dead_after_tokens

    @torch.no_grad()
    def _observe(self, affinities: Tensor, matches: Matches) -> None:
        fired = max_over_ranks((matches.per_feature() > 0).to(torch.uint8)).bool()
        tokens = sum_over_ranks(self.tokens_seen.new_tensor(affinities.shape[0]))
        self.tokens_seen += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired, 0)
        self.observe(affinities, matches)

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

    # The Trainer's steps: they log what `loss` and the metrics return, and decide nothing

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of activations and log its parts under ``train/``."""
        loss, stats = self.loss(_activations(batch))
        shown = {"loss", "l0", "dead_fraction"}
        for name, value in stats.items():
            self.log(f"train/{name}", value, prog_bar=name in shown)
        self.log("train/tokens", self.tokens_seen.float())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics with a batch of held-out activations."""
        if not self.trainer.sanity_checking:  # before the first step there is nothing to measure
            self._measure(_activations(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics with a batch of held-out activations."""
        self._measure(_activations(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Matches:
        """Return the matches of a batch of activations."""
        return self.match(_activations(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under ``val/``."""
        if not self.trainer.sanity_checking:
            self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics under ``test/``."""
        self._log_metrics("test")

    def _measure(self, x: Tensor) -> None:
        codes = self.encode(x)
        self.fvu.update(self.decode(codes), x)
        for metric in (self.l0, self.l0_std, self.feature_density, self.dead_features):
            metric.update(codes)

    def _log_metrics(self, stage: str) -> None:
        tokens = sum_over_ranks(self.feature_density.tokens)  # what compute() below is over
        figures = {
            "fvu": self.fvu.compute(),
            "l0": self.l0.compute(),
            "l0_std": self.l0_std.compute(),
            "dead_fraction": self.dead_features.compute(),
            "dying_fraction": dying_fraction(self.feature_density.compute(), int(tokens)),
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
        optimizer = self._optimizer(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        if self._lr_scheduler is not None:
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
        features, width = checkpoint["state_dict"]["W_dec"].shape
        name = checkpoint.get("architecture", "an unnamed architecture")
        found = f"{name}(d_model={width}, n_features={features})"
        expected = f"{type(self).__name__}(d_model={self.d_model}, n_features={self.n_features})"
        if found != expected:
            raise ValueError(f"the checkpoint holds {found}, the configuration asks for {expected}")

    # Details

    def _dictionary(self) -> Tensor:
        """Return the decoder with unit rows, in float32 or wider: its sums carry a large mean."""
        return _unit_rows(self.W_dec.to(torch.promote_types(self.W_dec.dtype, torch.float32)))

    def _reconstruct(self, matches: Matches) -> Tensor:
        """Return the scaled activations (tokens, d_model) that matches stand for."""
        with torch.autocast(matches.value.device.type, enabled=False):
            dictionary = self._dictionary()
            return weighted_sum(matches, dictionary) + self.b_dec.to(dictionary.dtype)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise ValueError(f"activations are {x.shape[-1]} wide, expected d_model={self.d_model}")

    def _scale(self, x: Tensor) -> Tensor:
        self._check_width(x)
        return x.to(torch.promote_types(self.W_dec.dtype, torch.float32)) * self.input_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseAutoencoder":
        """Move buffers between devices, but keep them in float32 when weights become 16-bit."""
        exact = {n: b for n, b in self.named_buffers(recurse=False) if b.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self


def _unit_rows(directions: Tensor) -> Tensor:
    """Normalise rows inside the graph, which projects their gradient orthogonal to them.

    The stored rows have unit norm between steps already; this makes it true in any training loop.
    """
    return functional.normalize(directions, dim=1)


def _activations(batch: Any) -> Tensor:
    """Return the activations in a batch: a tensor, a mapping, or what a TensorDataset yields."""
    if isinstance(batch, Mapping):
        batch = batch["activations"]
    if isinstance(batch, Sequence):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(f"a batch must hold a tensor of activations, not {type(batch).__name__}")
    return batch
