"""What architectures that choose over the batch share: thresholds that replace the batch.

Source of the idea: Bussmann et al. 2024 (BatchTopK, arXiv 2412.06410), who average the smallest
chosen activation. How Ayonrinde 2024 evaluates without a batch is not known to us.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sae.allocation import Matches, Scores, mutual_choice, threshold_choice
from lightning_sae.checks import UsageError
from lightning_sae.parallel.legacy import (
    gather_over_ranks,
    length_over_ranks,
    mean_over_ranks,
    min_over_ranks,
    rank_group,
)
from lightning_sae.parallel.ranks import Ranks
from lightning_sae.sae import SparseAutoencoder

Scope = Literal["global", "local"]
"""Which tokens are chosen from together, under data parallelism:

* `global`: those of all ranks, so that the number of ranks does not show;
* `local`: those of each rank by itself. It saves six or seven small messages a batch, but ranks can
  no longer share a budget by need, and the result depends on their number.
"""


class ThresholdSAE(SparseAutoencoder):
    """An architecture that trains on the batch and evaluates each token against thresholds.

    Attributes:
        averaging: Weight of the past, a batch, in the running average. The threshold falls while
            dictionaries improve, and a long average lags behind it: it would fire too rarely.
        threshold: Running average of what each training batch was cut at, float32, NaN until the
            first one. In the units of the scores: those of scaled activations, for affinities.
        k: Expected matches per token.
        scope: Which tokens are chosen from together.
    """

    averaging = 0.9
    k: int
    scope: Scope
    threshold: Tensor
    _cuts: tuple[float, float] | None = None  # what the last two batches were cut at

    def register_threshold(self, *shape: int) -> None:
        """Add the buffer: one threshold, or with n_features as the shape one a feature."""
        self.register_buffer("threshold", torch.full(shape, torch.nan, dtype=torch.float32))

    def batch_tokens(self, scores: Scores) -> int:
        """Return how many tokens are chosen from together: those of all ranks, or of this one."""
        return len(scores) if self.scope == "local" else length_over_ranks(scores)

    def choose_by_batch(self, scores: Scores) -> Matches:
        """Match the k * tokens pairs of largest score among all that are chosen from together."""
        guess = None
        if self._cuts is not None:
            # Cuts fall while dictionaries improve. Without influence on the choice, so not saved.
            before, last = self._cuts
            margin = min(2 * abs(last - before) + 0.03 * last, 0.2 * last)
            guess = last - margin if last > 0 else None
        return mutual_choice(
            scores, self.k * self.batch_tokens(scores), guess, ranks=self.ranks_that_choose()
        )

    def ranks_that_choose(self) -> Ranks | None:
        """Return the processes whose tokens are chosen from together; None for this one alone."""
        return None if self.scope == "local" else Ranks(rank_group())

    def batch_threshold(self, chosen: Matches) -> Tensor:
        """Return the smallest chosen score of a batch, 0-d; zero if nothing was positive."""
        smallest = chosen.value.min() if len(chosen) else chosen.value.new_tensor(torch.inf)
        if self.scope == "global":
            smallest = min_over_ranks(smallest)
        smallest = smallest.where(smallest.isfinite(), 0)
        return smallest if self.scope == "global" else mean_over_ranks(smallest)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the threshold to what gives exactly k matches a token on these activations.

        Training keeps thresholds near it; this is for the end of training, on tokens enough for
        the rarest feature: 100 times the inverse of its density.

        Args:
            x: Activations, shape (tokens, d_model). Under data parallelism, those of this rank; the
                threshold is that of all together.

        Raises:
            ValueError: If x is not d_model wide.
            FloatingPointError: If affinities are NaN or infinite.
        """
        self.threshold.copy_(self.calibrated(self.scaled(x)))

    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return `threshold` as all ranks' scaled activations (tokens, d_model) would have it.

        By default the midpoint of the last chosen and first rejected score of all pairs, 0-d.
        """
        budget = self.k * length_over_ranks(scaled)
        everything = length_over_ranks(scaled) * self.n_features
        guess = 0.9 * float(self.threshold.mean())  # NaN before the first batch
        # One more than the budget: the first that is rejected.
        chosen = mutual_choice(
            self.scores(scaled),
            min(budget + 1, everything),
            guess if guess > 0 else None,
            ranks=Ranks(rank_group()),
        )
        smallest = chosen.value.sort().values[:2]
        last_two = torch.cat(gather_over_ranks(smallest)).sort().values[:2]
        if length_over_ranks(chosen.token) > budget:
            return last_two.mean()
        return last_two[:1].sum() / 2  # nothing positive was rejected

    def choose_alone(self, scores: Scores) -> Matches:
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

    def observe(self, scores: Scores, chosen: Matches) -> None:
        """Move the threshold towards what this batch was cut at."""
        seen = self.batch_threshold(chosen).float()
        own = self.scope == "local" and len(chosen) > 0
        last = float(chosen.value.min() if own else seen)
        self._cuts = (self._cuts[1] if self._cuts else last, last)
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
            raise UsageError(f"the checkpoint's thresholds are for k={learned}, not for k={asked}")

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the mean threshold."""
        return {"threshold": self.threshold.mean()}
