"""JumpReLU: Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sae.allocation import Choice, common_threshold, scaled_thresholds, threshold_choice
from lightning_sae.callbacks.calibrate_thresholds import calibration
from lightning_sae.checks import UsageError, require_choice, require_k, require_not_negative
from lightning_sae.core.gate import Gate
from lightning_sae.core.loading import require_finite
from lightning_sae.core.penalty_weight import PenaltyWeight
from lightning_sae.matches import Matches
from lightning_sae.numerics import wide
from lightning_sae.parallel import local
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.selection import Scores

_LEAST = 1e-4  # a threshold of zero could not be multiplied; the source begins with 1e-3


class JumpReLUSAE(SparseAutoencoder):
    """Every feature learns a threshold, and fires where its affinity is above it.

    Codes, and their number, jump where an affinity passes a threshold. In place of a derivative a
    threshold gets an estimate of that of the expected loss, from affinities that are less than half
    a `bandwidth` away: the source's straight-through estimator, with a rectangular kernel. Nothing
    else learns by it. One search finds these pairs and the matches, and later costs grow with both.

    The source sweeps the weight of the penalty. Here it is moved until tokens have k matches on
    average, and thresholds begin at the one value by which the first batch has them, not near zero.
    They are trained as they are: logarithms hardly move by small steps. After the last step all are
    multiplied by the one factor that gives k on held-out text.

    `penalty="tanh"` is Anthropic's of January 2025 (Conerly et al.,
    https://transformer-circuits.pub/2025/january-update): the sum of ``tanh(4 z)`` over codes z.
    They have a bandwidth of ``2 / sqrt(d_model)`` in our units, and a pre-activation loss of 3e-6.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        bandwidth: Width of the band, in units in which a centred token has a mean squared length of
            1. It should be wider than a step of the optimizer, the learning rate, is long.
        penalty: What keeps matches few: their number, or the sum of a function of codes.
        pre_act_coefficient: Weight of the pre-activation loss: how far affinities are below their
            thresholds, added up over all features. It revives dead ones.
        aux_coefficient: Weight of another loss that revives dead features; the source has none.
        options: Those of `lightning_sae.SparseAutoencoder`.

    Attributes:
        unit_threshold: The thresholds in the units of `bandwidth`, in which steps of an optimizer
            suit them, float32 or wider, (n_features,); NaN before the first batch.
        penalty_weight: The weight of the penalty, `lightning_sae.core.penalty_weight`.
        tanh_steepness: What codes are multiplied by in that penalty.

    Raises:
        ValueError: If a setting is out of range.
    """

    exact_parameters: ClassVar[tuple[str, ...]] = ("unit_threshold",)
    renewable: ClassVar[tuple[str, ...]] = ("unit_threshold",)
    tanh_steepness = 4.0

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        bandwidth: float = 0.001,
        penalty: Literal["l0", "tanh"] = "l0",
        pre_act_coefficient: float = 0.0,
        aux_coefficient: float = 0.0,
        **options: Any,
    ) -> None:
        require_k(k, n_features)
        require_choice(penalty=penalty, of=("l0", "tanh"))
        require_not_negative(pre_act_coefficient=pre_act_coefficient)
        if not 0 < bandwidth < math.inf:
            raise UsageError(f"bandwidth={bandwidth} must be a finite number, more than 0")
        super().__init__(d_model, n_features, aux_coefficient=aux_coefficient, **options)
        self.k = k
        self.bandwidth = bandwidth
        self._width = bandwidth * math.sqrt(d_model)  # in the units of affinities
        self.penalty = penalty
        self.pre_act_coefficient = pre_act_coefficient
        unknown = torch.full((n_features,), torch.nan, dtype=torch.float32)
        self.unit_threshold = nn.Parameter(unknown)
        self.penalty_weight = PenaltyWeight(k)

    @property
    def threshold(self) -> Tensor:
        """What affinities are compared with, (n_features,), with a gradient to those here."""
        own = wide(local(self.unit_threshold))
        return self.layout.share.whole(own) * math.sqrt(self.d_model)

    @threshold.setter
    def threshold(self, threshold: Tensor) -> None:
        unit = (threshold / math.sqrt(self.d_model)).clamp_min(_LEAST)
        local(self.unit_threshold).data.copy_(unit[self.layout.share.here])

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Multiply thresholds by what gives k matches a token, as `ThresholdSAE.calibrate` does.

        Before the first batch they become equal instead, and have as many.
        """
        x, ranks = self.ordinary(x), self.layout.ranks
        if not (tokens := ranks.count(x, x.device)):
            raise UsageError("calibrate takes activations of at least one token")
        scores, threshold = self.scores(self.scaled(x)), self.threshold
        if threshold.isnan().any():
            cut = common_threshold(scores, self.k * tokens, ranks=ranks)
            self.threshold = cut.expand(self.n_features)
        else:
            self.threshold = scaled_thresholds(scores, threshold, self.k * tokens, ranks=ranks)

    def prepare(self, x: Tensor) -> None:
        """Let thresholds begin where this batch has k matches a token, if it is the first."""
        super().prepare(x)
        if not self.penalty_weight.begun and self.layout.ranks.count(x, x.device):
            self.calibrate(x)
            # What a match adds to the loss is then what one at the threshold explains of it.
            self.penalty_weight.begin((self.threshold.detach().square() / self.d_model).mean())

    def renew_features(self, features: Tensor, alive: Tensor, scale: float) -> None:
        """Give features that start anew a threshold that is less by as much as their encoders are.

        Args:
            features: Those of them that are here, int64, counted from the first here.
            alive: Which features go on as they are, (n_features,).
            scale: Length of their encoders, of the mean of those alive.
        """
        known = self.threshold[alive] if bool(alive.any()) else self.threshold
        unit = scale * known.mean() / math.sqrt(self.d_model)
        local(self.unit_threshold)[features] = unit.clamp_min(_LEAST).to(self.unit_threshold.dtype)

    def normalize_decoder(self) -> None:
        """Give every row of the decoder unit norm again, and keep thresholds positive."""
        super().normalize_decoder()
        local(self.unit_threshold).data.clamp_min_(_LEAST)

    def choose(self, scores: Scores) -> Choice:
        """Match pairs above their thresholds, and with a code of 0 those in the band below."""
        return Choice(threshold_choice(scores, self.threshold - self._width / 2))

    def choose_per_token(self, scores: Scores) -> Matches:
        """Match every pair whose affinity is above its threshold, once a batch has set these."""
        if (threshold := self.threshold).isnan().any():
            raise UsageError(
                f"threshold of {type(self).__name__} is not calibrated: "
                "train on at least one batch, or load a trained checkpoint, before inference"
            )
        return threshold_choice(scores, threshold)

    def matches_of(self, scaled: Tensor, chosen: Matches) -> Matches:
        """Return matches with their codes, and the gradients of encoder and thresholds."""
        matches = self.with_gradient(scaled, chosen)
        threshold = self.threshold[matches.feature]
        codes = matches.value * (matches.value > threshold).detach()
        return matches.with_values(codes - self._kept_out(codes, threshold) * threshold.detach())

    def extra_losses(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the penalty, and the losses that revive features if there are any."""
        tokens, codes, threshold = max(1, len(scaled)), matches.value, self.threshold
        own = threshold[matches.feature]
        if self.penalty == "l0":
            penalties = (codes > 0).to(own) - self._kept_out(codes, own)
        else:
            penalties = (self.tanh_steepness * codes).tanh()
        losses = {"sparsity_loss": self.penalty_weight(penalties.sum() / tokens)}
        if self.pre_act_coefficient and len(scaled):
            # Over all pairs, as if none fired, and then over those that do.
            below = (threshold - self.mean_affinities(scaled)).sum()
            affinities = codes + self._kept_out(codes, own) * own.detach()
            above = (affinities - own)[codes > 0].sum() / tokens
            losses["pre_act_loss"] = self.pre_act_coefficient * (below + above) / self.d_model
        return losses | super().extra_losses(scaled, matches, error)

    def _kept_out(self, codes: Tensor, threshold: Tensor) -> Tensor:
        """Return zeros whose gradient is that of how many pairs thresholds keep from firing.

        Both have a row a pair. Pairs that do not fire have a code of 0, and all of them are near.
        """
        near = (codes < threshold + self._width / 2).detach()
        return near * (threshold - threshold.detach()) / self._width

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Adjust the weight of the penalty to the matches that there were."""
        pairs = choice.matches
        fires = (pairs.value > self.threshold[pairs.feature]).sum()
        self.penalty_weight.observe(fires, len(scores), self.layout.ranks)

    def gate(self) -> Gate:
        """Return that affinities above their thresholds are the code."""
        return Gate(threshold=self.threshold.detach())

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse also thresholds that are not finite, unless no batch has set them: all NaN."""
        super().check_state(state)
        if "unit_threshold" in state and not bool(local(state["unit_threshold"]).isnan().all()):
            require_finite(state, "unit_threshold", least=0)

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the mean threshold, and the weight of the penalty."""
        weight = self.penalty_weight.weight
        return {"threshold": self.threshold.mean(), "penalty_weight": weight.clone()}

    def configure_callbacks(self) -> list[Callback]:
        """Return also what calibrates thresholds after the last step, unless the Trainer has it."""
        return super().configure_callbacks() + calibration(self.trainer)
