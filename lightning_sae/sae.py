"""The LightningModule that every architecture is: steps that log what the core returns."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_sae.data.batches import activations_in
from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureDensity
from lightning_sae.metrics.collection import collect, figures, of_a_dictionary
from lightning_sae.optim.averaging import average_weights_only
from lightning_sae.optim.chunked_adam import ChunkedAdam, require_all_tokens
from lightning_sae.optim.clipping import clip_fused
from lightning_sae.optim.factories import (
    MakeOptimizer,
    MakeSchedule,
    in_terms_of,
    optimizer_and_schedule,
)
from lightning_sae.optim.learning_rate import train_at
from lightning_sae.optim.whole_steps import WholeSteps
from lightning_sae.parallel.agreement import average_gradients, start_alike
from lightning_sae.pretrained import PretrainedAutoencoder
from lightning_sae.uncompiled import uncompiled

__all__ = ["Encoded", "SparseAutoencoder"]


class Encoded(NamedTuple):
    """What a validation or test step made of its batch, for callbacks that need it too.

    Attributes:
        codes: The matches of its tokens.
        reconstruction: What they stand for, (tokens, d_model), in the units of the activations.
    """

    codes: Matches
    reconstruction: Tensor


class SparseAutoencoder(PretrainedAutoencoder):
    """A sparse autoencoder that Lightning can train: the base of every architecture.

    What it is and learns is `lightning_sae.core.Autoencoder`, and needs no Trainer: `forward`,
    `encode`, `decode` and `loss` serve a plain loop, or a parent LightningModule of which this is a
    child. There, call `normalize_decoder` after each optimizer step, as the Trainer does here.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a schedule, stepped every batch, from the optimizer. Default: warm-up in
            the first twentieth of the run, then linear decay to zero.
        options: Those of `lightning_sae.core.Autoencoder`, which also says what it raises.
    """

    # Primitives only: checkpoints with classes among their hyperparameters do not load safely.
    not_noted: ClassVar[tuple[str, ...]] = ("optimizer", "lr_scheduler")

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        optimizer: MakeOptimizer = torch.optim.Adam,
        lr_scheduler: MakeSchedule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_features, **options)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._lr: float | None = None
        self._metrics: list[MetricCollection] = []  # in a list: they are no part of the model
        self.save_hyperparameters()
        self.save_hyperparameters(
            {
                "normalize_inputs": self.normalize_inputs,
                "aux_coefficient": self.revival.coefficient,
                "dying_below": self.revival.dying_below,
                "k_aux": self.revival.k,
                "aux_every": self.revival.every,
                "dead_after_tokens": self.history.dead_after_tokens,
                "max_norm_multiple": self.max_norm_multiple,
                "prefixes": self.prefixes,
            }
        )

    @property
    def lr(self) -> float | None:
        """The learning rate to begin with in place of the optimizer's own; None: that.

        Set by Lightning's `Tuner.lr_find` and `LearningRateFinder`, or by hand before a run.
        """
        return self._lr

    @lr.setter
    def lr(self, rate: float | None) -> None:
        self._lr = rate
        if rate is not None and self._trainer is not None:
            train_at(rate, self._trainer, self._lr_scheduler)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of a validation or test, by name; extend it to add one's own.

        They are made anew for each, and updated with each batch of held-out activations: `codes`
        (`Matches`), `reconstruction` and `activations`, both (tokens, d_model), of which a metric's
        `update` takes those that it names. Every number in what they compute is logged: a metric's
        as `val/<name>` and `test/<name>`, those of a dictionary under its own keys.
        """
        group = self.layout.ranks.group
        return of_a_dictionary(self.d_model, self.n_features, self.prefixes, process_group=group)

    def measure(self, x: Tensor) -> Encoded:
        """Measure on activations, (..., d_model), and return what was made of them."""
        x = x.reshape(-1, x.shape[-1])
        matches = self.match(x)
        reconstruction = self.reconstruct(matches) / self.scales(x)
        made = {"codes": matches, "reconstruction": reconstruction, "activations": x}
        self._metrics[0].update(**made, prefix_errors=self.prefix_errors(x, matches))
        return Encoded(matches, reconstruction)

    def measured(self) -> dict[str, Tensor]:
        """Return the figures of the validation or test under way, or of the last one."""
        return figures(self._metrics[0]) | self.threshold_statistics()

    @property
    def feature_density(self) -> FeatureDensity | None:
        """The densities of the validation or test under way, or of the last one."""
        metrics = dict(self._metrics[0].items(copy_state=False)) if self._metrics else {}
        return cast("FeatureDensity | None", metrics.get("feature_density"))

    def on_validation_epoch_start(self) -> None:
        """Measure afresh."""
        self._metrics = [collect(self.configure_metrics()).to(self.device)]

    @uncompiled
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Encoded] | None:
        """Update the metrics with a batch of held-out activations; return it as `encoded`."""
        if self.trainer.sanity_checking:  # before the first step there is nothing to measure
            return None
        return {"encoded": self.measure(activations_in(batch))}

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under ``val/``."""
        if not self.trainer.sanity_checking:
            self._log_metrics("val")
            self.note_figures()

    def on_test_epoch_end(self) -> None:
        """Log the metrics under ``test/``."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.measured().items():
            self.log(f"{stage}/{name}", value.float())

    @uncompiled
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of activations and log its parts under ``train/``."""
        loss, stats = self.loss(activations_in(batch))
        for name, value in stats.items():
            self.log(f"train/{name}", value, prog_bar=name in {"loss", "l0", "dead_fraction"})
        self.log("train/tokens", self.history.tokens_seen.float())
        return loss

    @uncompiled
    def predict_step(self, batch: Any, batch_idx: int) -> Matches:
        """Return the matches of a batch of activations."""
        return self.match(activations_in(batch))

    def share_is_over(self, share: float) -> bool | None:
        """Return whether a share of the Trainer's run is over; None if it has no set length."""
        steps = self.trainer.estimated_stepping_batches if self._trainer else math.inf
        return None if steps == math.inf else self.trainer.global_step >= share * steps

    def configure_model(self) -> None:
        """Share out the features over the devices if the strategy is a `ModelParallelStrategy`.

        Its `tensor_parallel_size` devices each have a share of the features and the same tokens;
        `data_parallel_size` such groups have different tokens.

        Raises:
            ValueError: If there are more devices than features.
        """
        if self.device_mesh is not None:
            self.share_out(self.device_mesh)

    def configure_callbacks(self) -> list[Callback]:
        """Return what keeps checkpoints from between the batches of an optimizer step."""
        return [WholeSteps()]

    def on_fit_start(self) -> None:
        """Start from the same weights in all groups of devices that share out the features."""
        super().on_fit_start()
        start_alike(self, self.layout)
        if self._trainer is not None:
            average_weights_only(self._trainer, self)

    def on_after_backward(self) -> None:
        """Average gradients over groups of devices that share out the features."""
        average_gradients(self, self.layout)

    def configure_optimizers(self, parameters: Any = None) -> OptimizerLRScheduler:
        """Return the optimizer, of these parameters or of all, and its schedule, for every batch.

        Raises:
            ValueError: If it does not take its settings, or cannot see the gradients.
        """
        with in_terms_of("optimizer", ValueError, RuntimeError):
            optimizer = self._optimizer(parameters or self.parameters())
        for group in optimizer.param_groups if self.lr is not None else ():
            group["lr"] = self.lr
        if isinstance(optimizer, ChunkedAdam):
            require_all_tokens(self.trainer, devices=len(self.layout.share.sizes))
        self.leave_gradients_in_parts(isinstance(optimizer, ChunkedAdam))
        schedule, steps = self._lr_scheduler, self.trainer.estimated_stepping_batches
        return optimizer_and_schedule(optimizer, schedule, steps)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; a length that torch finds out about only now is a mistake too."""
        name = f"lr_scheduler={type(scheduler).__name__}"
        empty = in_terms_of(f"{name} has a length of 0", ZeroDivisionError)
        with in_terms_of(name, ValueError), empty:
            super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the Trainer is set to, those of a fused optimizer always."""
        settings = gradient_clip_val, gradient_clip_algorithm
        if not clip_fused(self.trainer.precision_plugin, optimizer, *settings):
            super().configure_gradient_clipping(optimizer, *settings)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then restore the unit norm: before any callback can write a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.normalize_decoder()
