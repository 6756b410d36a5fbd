"""What architectures that choose over the batch share: thresholds that replace the batch.

Source of the idea: Bussmann et al. 2024 (BatchTopK, arXiv 2412.06410), who average the smallest
chosen activation. How Ayonrinde 2024 evaluates without a batch is not known to us.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_sae.allocation import Matches, threshold_choice
from lightning_sae.distributed import mean_over_ranks
from lightning_sae.sae import SparseAutoencoder


class ThresholdSAE(SparseAutoencoder):
    """An architecture that trains on the batch and evaluates each token against thresholds.

    Attributes:
        averaging: Weight of the past, a batch, in the running average. The threshold falls while
            dictionaries improve, and a long average lags behind it: it would fire too rarely.
        threshold: Running average of what each training batch was cut at, float32, NaN until the
            first one. In the units of the scores: those of scaled activations, for affinities.
    """

    averaging = 0.9
    threshold: Tensor

    def register_threshold(self, *shape: int) -> None:
        """Add the buffer: one threshold, or with n_features as the shape one a feature."""
        self.register_buffer("threshold", torch.full(shape, torch.nan, dtype=torch.float32))

    @abstractmethod
    def batch_threshold(self, scores: Tensor, matches: Matches) -> Tensor:
        """Return what a batch was cut at, in the shape of `threshold`."""

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the threshold to what gives exactly k matches a token on these activations.

        Training keeps thresholds near it; this is for the end of training, on tokens enough for
        the rarest feature: 100 times the inverse of its density. Under data parallelism each rank
        calibrates on its own tokens, and the mean is taken.

        Args:
            x: Activations, shape (tokens, d_model).

        Raises:
            ValueError: If x is not d_model wide.
        """
        self.threshold.copy_(mean_over_ranks(self.calibrated(self.scaled(x)).float()))

    @abstractmethod
    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return `threshold` as these scaled activations (tokens, d_model) would have it."""

    def choose_alone(self, scores: Tensor) -> Matches:
        """Match every pair whose score is above the threshold.

        Raises:
            RuntimeError: If no training batch has set the threshold.
        """
        if self.threshold.isnan().any():
            raise RuntimeError(
                f"threshold of {type(self).__name__} is not calibrated: "
                "train on at least one batch, or load a trained checkpoint, before eval()"
            )
        return threshold_choice(scores, self.threshold)

    def observe(self, scores: Tensor, matches: Matches) -> None:
        """Move the threshold towards what this batch was cut at."""
        seen = mean_over_ranks(self.batch_threshold(scores, matches).float())
        first = self.threshold.isnan()
        self.threshold.copy_(
            torch.where(first, seen, self.threshold.lerp(seen, 1 - self.averaging))
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse also a checkpoint whose thresholds were learned for another k.

        Raises:
            ValueError: If it is one.
        """
        super().on_load_checkpoint(checkpoint)
        learned, asked = checkpoint["hyper_parameters"].get("k"), self.hparams.get("k")
        if learned != asked:
            raise ValueError(f"the checkpoint's thresholds are for k={learned}, not for k={asked}")

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the mean threshold."""
        return {"threshold": self.threshold.mean()}
