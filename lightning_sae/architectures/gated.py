"""Gated: Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

from lightning_sae.allocation import Choice, common_threshold, cut_above, threshold_choice
from lightning_sae.callbacks.calibrate_thresholds import calibration
from lightning_sae.checks import UsageError, require_k
from lightning_sae.core.gate import Gate
from lightning_sae.core.losses import reconstruction_loss, sparsity_loss
from lightning_sae.core.penalty_weight import PenaltyWeight
from lightning_sae.matches import Matches
from lightning_sae.numerics import wide
from lightning_sae.parallel import local
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.selection import Scores


class GatedSAE(SparseAutoencoder):
    """One encoder says whether a feature fires, and another, of the same directions, how strongly.

    Affinities are gates: a feature fires where its gate is positive. Its code is ``exp(r) u + b``,
    if that is positive, with u the gate less the gate's bias, and r and b of its own. So the L1
    penalty that keeps gates few does not shrink the codes. A second reconstruction, from the gates
    themselves, is what gates learn by; its decoder is detached, as in the source.

    The source sweeps the weight of the penalty. Here it is moved until tokens have k matches on
    average (`lightning_sae.core.penalty_weight`), and gates begin with a bias by which the first
    batch has them, and with the codes of the affinities that the encoder had. After the last step
    all gates are moved by the one number that gives k on held-out text.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        aux_coefficient: Weight of a loss that revives dead features; the source resamples them.
        options: Those of `lightning_sae.SparseAutoencoder`.

    Attributes:
        log_gain: r, shape (n_features,).
        magnitude_bias: b, shape (n_features,).
        penalty_weight: The weight of the penalty.

    Raises:
        ValueError: If a size is out of range.
    """

    renewable: ClassVar[tuple[str, ...]] = ("log_gain", "magnitude_bias")

    def __init__(
        self, d_model: int, n_features: int, k: int, *, aux_coefficient: float = 0.0, **options: Any
    ) -> None:
        require_k(k, n_features)
        super().__init__(d_model, n_features, aux_coefficient=aux_coefficient, **options)
        self.k = k
        self.log_gain = nn.Parameter(torch.zeros(n_features))
        self.magnitude_bias = nn.Parameter(torch.zeros(n_features))
        self.penalty_weight = PenaltyWeight(k)

    def prepare(self, x: Tensor) -> None:
        """Let gates begin where this batch has k matches a token, if it is the first."""
        super().prepare(x)
        ranks, x = self.layout.ranks, self.ordinary(x)
        if not self.penalty_weight.begun and (tokens := ranks.count(x, x.device)):
            if not self.threshold.any():  # it was not trained elsewhere
                cut = common_threshold(self.scores(self.scaled(x)), self.k * tokens, ranks=ranks)
                self.threshold = cut.expand(self.n_features)
            # That which shrinks gates by as much as thresholds are.
            self.penalty_weight.begin(2 * self.threshold.mean().clamp_min(1e-4))

    @property
    def threshold(self) -> Tensor:
        """What codes are above where gates are positive, (n_features,)."""
        gain, bias, gate_bias = self._magnitudes()
        return (bias - gain * gate_bias).detach()

    @threshold.setter
    def threshold(self, threshold: Tensor) -> None:
        gain, bias, _ = self._magnitudes()
        gate_bias = ((bias - threshold) / gain).detach()
        local(self.encoder.bias).data.copy_(gate_bias[self.layout.share.here])

    def take_over(self, state_dict: Mapping[str, Tensor]) -> None:
        """Become what another SAE is, as `Dictionary.take_over` does, with codes of its encoder."""
        super().take_over(state_dict)
        local(self.log_gain).data.zero_()
        local(self.magnitude_bias).data.copy_(local(self.encoder.bias).data)

    def renew_features(self, features: Tensor, alive: Tensor, scale: float) -> None:
        """Give features that start anew the codes of their gates, whatever their encoders' length.

        Args:
            features: Those of them that are here, int64, counted from the first here.
            alive: Which features go on as they are, (n_features,).
            scale: Length of their encoders, of the mean of those alive.
        """
        local(self.log_gain)[features] = 0
        local(self.magnitude_bias)[features] = 0

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Move all gates by the one number by which k features of a token fire.

        Args:
            x: As `ThresholdSAE.calibrate` takes it, which also says what is raised.
        """
        ranks, x = self.layout.ranks, self.ordinary(x)
        if not (tokens := ranks.count(x, x.device)):
            raise UsageError("calibrate takes activations of at least one token")
        scaled, bias, budget = self.scaled(x), local(self.encoder.bias).data, self.k * tokens
        typical, before = float(self.threshold.abs().mean()), bias.clone()
        for lift in (0.0, 0.1, 0.3, 1.0, 3.0):  # until gates are open for enough to choose among
            bias.copy_(before + lift * typical)
            found = self.match(x)
            opened = self.affinities_of(scaled, found.select(found.value > 0))
            if ranks.count(opened, x.device) > budget:
                bias -= cut_above(opened, budget, ranks=ranks)
                return
        bias.copy_(before)  # so many codes are not positive

    def _magnitudes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gains, biases and the biases of gates, each (n_features,)."""
        whole = self.layout.share.whole
        rows = self.log_gain, self.magnitude_bias, self.encoder.bias
        log_gain, bias, gate_bias = (whole(wide(local(each))) for each in rows)
        return log_gain.exp(), bias, gate_bias

    def choose(self, scores: Scores) -> Choice:
        """Match every pair whose gate is positive."""
        return Choice(self.choose_per_token(scores))

    def choose_per_token(self, scores: Scores) -> Matches:
        """Match as in training: a token's matches do not depend on the other tokens."""
        return threshold_choice(scores, 0.0)

    def matches_of(self, scaled: Tensor, chosen: Matches) -> Matches:
        """Return matches with their codes, and the gradients of both encoders."""
        gates = self.with_gradient(scaled, chosen)
        gain, bias, gate_bias = (each[gates.feature] for each in self._magnitudes())
        return gates.with_values(functional.relu(gain * (gates.value - gate_bias) + bias))

    def extra_losses(self, scaled: Tensor, matches: Matches, error: Tensor) -> dict[str, Tensor]:
        """Return the penalty, what gates learn by, and the loss that revives features if any."""
        gates = matches.with_values(self.affinities_of(scaled, matches).clamp_min(0))
        gates = self.with_gradient(scaled, gates)
        losses = {
            "sparsity_loss": self.penalty_weight(sparsity_loss(gates, self.d_model)),
            "gate_loss": reconstruction_loss(scaled - self.reconstruct(gates, frozen=True)),
        }
        return losses | super().extra_losses(scaled, matches, error)

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Adjust the weight of the penalty to the matches that there were."""
        fires = choice.matches.per_token().sum()
        self.penalty_weight.observe(fires, len(scores), self.layout.ranks)

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the mean threshold of codes, and the weight of the penalty."""
        weight = self.penalty_weight.weight.clone()
        return {"threshold": self.threshold.mean(), "penalty_weight": weight}

    def gate(self) -> Gate:
        """Return that codes are of positive affinities, by a gain and a bias a feature."""
        gain, bias, gate_bias = (each.detach() for each in self._magnitudes())
        zero = torch.zeros_like(bias)
        return Gate(threshold=zero, gain=gain, offset=bias - gain * gate_bias)

    def configure_callbacks(self) -> list[Callback]:
        """Return also what calibrates gates after the last step, unless the Trainer has it."""
        return super().configure_callbacks() + calibration(self.trainer)
