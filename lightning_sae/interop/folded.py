"""An SAE without scales of its own: what every format is written from and read into."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.architectures import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    StandardSAE,
    TopKSAE,
    Transcoder,
)
from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.parallel import Ranks
from lightning_sae.sae import SparseAutoencoder

__all__ = [
    "OWN",
    "FoldedSAE",
    "fold",
    "require_inputs_as_they_are",
    "require_plain_thresholds",
    "unfold",
    "without_gates",
]

OWN: Final = "lightning_sae_jumprelu"
"""What formats that say a class by its name call one with thresholds that nobody else has."""


@dataclass(frozen=True)
class FoldedSAE:
    """Parameters in the units of activations, or, if these are normalised, of length sqrt(d_model).

    With x the activations, the affinities are ``z' = (x - b) E^T + e``, and codes z stand for
    ``z D + b``. All tensors are float32, on the CPU.

    Attributes:
        encoder_weight: E, shape (n_features, d_model).
        encoder_bias: e, shape (n_features,).
        decoder_weight: D, shape (n_features, d_model).
        decoder_bias: b, shape (d_model,).
        gate: Which affinities are the code.
        unit_length: Whether x is each token brought to the length sqrt(d_model), and what codes
            stand for is brought back to the token's own.
        record: What is known of its training, as `SparseAutoencoder.record`.
        architecture: What the class was called that was trained.
        density: Share of tokens on which each feature fires, (n_features,), if it is known.
    """

    encoder_weight: Tensor
    encoder_bias: Tensor
    decoder_weight: Tensor
    decoder_bias: Tensor
    gate: Gate
    unit_length: bool = False
    record: dict[str, dict[str, Any]] = field(default_factory=dict)
    architecture: str | None = None
    density: Tensor | None = None

    @property
    def encoder_bias_of_x(self) -> Tensor:
        """The bias of an encoder that does not subtract b: e - E b, shape (n_features,)."""
        moved = self.encoder_weight.double() @ self.decoder_bias.double()
        return (self.encoder_bias.double() - moved).float()

    def subtracting_origin(self, encoder_bias_of_x: Tensor) -> FoldedSAE:
        """Return the same with the bias of an encoder that does not subtract b."""
        moved = self.encoder_weight.double() @ self.decoder_bias.double()
        return replace(self, encoder_bias=(encoder_bias_of_x.double() + moved).float())

    def affinities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return affinities (tokens, n_features) of activations, and what those of a code exceed.

        Args:
            x: Activations, shape (tokens, d_model).

        Returns:
            The affinities, and `Gate.cut` of them.
        """
        centred = x.float() / self._lengths(x) - self.decoder_bias
        affinities = centred @ self.encoder_weight.T + self.encoder_bias
        return affinities, self.gate.cut(affinities, centred.norm(dim=1, keepdim=True))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return dense codes (tokens, n_features) and reconstructions of activations x.

        The plain way, that others are compared with where their own library is not installed.
        """
        affinities, cut = self.affinities(x)
        if self.gate.k is None:
            codes = affinities.where(affinities > cut, 0)
        else:
            kept = affinities.clamp_min(0).topk(self.gate.k, dim=1)
            codes = torch.zeros_like(affinities).scatter(1, kept.indices, kept.values)
        result: Tensor = codes @ self.decoder_weight + self.decoder_bias
        return codes, result * self._lengths(x)

    def _lengths(self, x: Tensor) -> Tensor:
        """Return what tokens are divided by before, (tokens, 1), or 1."""
        if not self.unit_length:
            return x.new_ones((), dtype=torch.float32)
        lengths: Tensor = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
        return lengths.clamp_min(1e-12) / math.sqrt(x.shape[1])


def require_inputs_as_they_are(folded: FoldedSAE, to: str) -> None:
    """Refuse, for a library that cannot, to bring each token to the same length.

    Raises:
        UsageError: If the SAE does that.
    """
    if folded.unit_length:
        raise UsageError(
            f"to={to}: it cannot normalise tokens (normalize_inputs='token'): train with "
            "normalize_inputs=average"
        )


def require_plain_thresholds(gate: Gate, to: str) -> None:
    """Raise UsageError if thresholds are more than a number a feature, for what knows no others.

    Args:
        gate: What is to be written.
        to: Whose format it is.
    """
    if gate.relative and gate.k is None:
        raise UsageError(
            f"to={to}: it has no thresholds relative to a token's length (importance='token_norm')"
        )
    if gate.discount is not None:
        raise UsageError(
            f"to={to}: it knows no rank_discount={gate.discount.exponent}: export with "
            "without_discount=true, which takes its place by thresholds alone and says what that "
            "costs"
        )


def without_gates(
    weight: Tensor, gate_bias: Tensor, log_gain: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Gate]:
    """Return weight, bias and gate of the encoder that a Gated SAE is the same as.

    With u the products with `weight`, its codes are ``exp(log_gain) u + bias`` where that and ``u +
    gate_bias`` are positive: so they are above a threshold of their own.

    Args:
        weight: Shape (n_features, d_model).
        gate_bias: As all others, shape (n_features,).
        log_gain: See above.
        bias: See above.
    """
    gain = log_gain.double().exp()
    threshold = bias.double() - gain * gate_bias.double()
    scaled = (weight.double() * gain.unsqueeze(1)).float()
    return scaled, bias.float(), Gate(threshold=threshold.clamp_min(0).float())


@torch.no_grad()
def fold(sae: SparseAutoencoder) -> FoldedSAE:
    """Return an SAE with its input scale folded into its biases and thresholds.

    Raises:
        UsageError: If its rule of inference cannot be told to others, or was never learned.
    """
    if sae.layout.share.mesh is not None:
        raise UsageError("features are shared out over devices: load the SAE on one first")
    if isinstance(sae, Transcoder):
        raise UsageError(
            f"{type(sae).__name__} reconstructs something else than it reads, which of the formats "
            "saelens alone can say"
        )
    gate, scale = sae.gate(), _scale(sae)
    threshold = gate.threshold
    if threshold is not None:
        if threshold.isnan().any():
            raise UsageError(f"threshold of {type(sae).__name__} is not calibrated: train it first")
        threshold = threshold.double().cpu().expand(sae.n_features)
    weight, bias = sae.encoder.weight.float().cpu().clone(), sae.encoder.bias.double().cpu()
    if gate.gain is not None and gate.offset is not None and threshold is not None:
        # Of what codes are: threshold and all below zero are no code either.
        gain, offset = gate.gain.double().cpu(), gate.offset.double().cpu()
        weight = (weight * gain.unsqueeze(1)).float()
        bias = gain * bias + offset
        threshold = (gain * threshold + offset).clamp_min(0)
    if threshold is not None:
        threshold = (threshold / (1 if gate.relative else scale)).float().clone()
    origin = sae.decoder.bias.double().cpu() / scale
    density = sae.history.density.float().cpu()
    return FoldedSAE(
        encoder_weight=weight,
        encoder_bias=(bias / scale).float(),
        decoder_weight=functional.normalize(sae.decoder.weight.float().cpu(), dim=1),
        decoder_bias=origin.float(),
        gate=replace(gate, threshold=threshold, gain=None, offset=None),
        unit_length=sae.normalize_inputs == "token",
        record=sae.record,
        architecture=type(sae).__name__,
        density=density if density.any() else None,
    )


@torch.no_grad()
def unfold(
    folded: FoldedSAE, k: int | None = None, activations: Tensor | None = None
) -> SparseAutoencoder:
    """Return an SAE of the class whose inference is the same, ready to be measured or trained on.

    `TopKSAE` of a gate with k, `MutualChoiceSAE` of one threshold, `FeatureChoiceSAE` of one a
    feature, or `JumpReLUSAE` or `GatedSAE` where these were trained, and `StandardSAE` of none.
    What is not known of its training, densities say, is as in an SAE that was not trained.

    Args:
        folded: What to make one of.
        k: Expected matches per token. Default: what the record says of L0; needed for an SAE with
            thresholds of which nothing is known.
        activations: Some that it is for, (tokens, d_model): its mean and scale are measured on
            them. Without, they count as zero and 1: a mean ablation is then one by zeros, and
            losses have the units of activations.

    Raises:
        UsageError: If its codes cannot be those of unit-norm directions, or k is not known.
    """
    lengths = folded.decoder_weight.double().norm(dim=1).clamp_min(1e-12)
    gate = folded.gate
    if gate.k is not None and (lengths / lengths.mean() - 1).abs().max() > 1e-3:
        raise UsageError(
            "the decoder's rows have different lengths, by which the k largest codes are others: "
            "only an SAE with rows of one length, or that ranks by codes times lengths, is read"
        )
    sae = _of_the_class(folded, k)
    if activations is not None:
        sae.measure_inputs(activations, Ranks())
    scale = _scale(sae)
    sae.encoder.weight.copy_(folded.encoder_weight.double() * lengths.unsqueeze(1))
    sae.encoder.bias.copy_(folded.encoder_bias.double() * lengths * scale)
    sae.decoder.weight.copy_(folded.decoder_weight.double() / lengths.unsqueeze(1))
    sae.decoder.bias.copy_(folded.decoder_bias.double() * scale)
    sae.initialized.fill_(True)
    if gate.threshold is not None and gate.threshold.any():
        threshold = gate.threshold.double() * lengths * (1 if gate.relative else scale)
        own: Any = sae  # which of its class has some
        if isinstance(sae, GatedSAE):
            sae.magnitude_bias.copy_(sae.encoder.bias)
        own.threshold = (threshold if own.threshold.dim() else threshold[0]).float()
    if folded.density is not None:
        sae.history.density.copy_(folded.density)
    sae.record = folded.record
    return sae.eval()


def _of_the_class(folded: FoldedSAE, k: int | None) -> SparseAutoencoder:
    """Return an SAE of the class that a gate asks for, not yet with its parameters."""
    n_features, d_model = folded.encoder_weight.shape
    gate = folded.gate
    normalize: Any = {"normalize_inputs": "token" if folded.unit_length else "average"}
    if gate.k is not None:
        return TopKSAE(d_model, n_features, gate.k, **normalize)
    if gate.threshold is None or not gate.threshold.any():
        return StandardSAE(d_model, n_features, **normalize)
    l0 = folded.record.get("measured", {}).get("l0")
    if k is None and gate.discount is not None:
        k = gate.discount.k
    if k is None:
        if l0 is None:
            raise UsageError("k is not known: say how many matches per token are expected")
        k = min(n_features, max(1, round(l0)))
    lengths = folded.decoder_weight.norm(dim=1)
    own = gate.threshold * lengths
    one = bool(((own - own.mean()).abs() <= 1e-6 * own.mean()).all())
    for trained in (JumpReLUSAE, GatedSAE):
        name = trained.__name__.removesuffix("SAE").lower()
        if (folded.architecture or "").lower().startswith(name) and not gate.relative:
            return trained(d_model, n_features, k, **normalize)
    kind = MutualChoiceSAE if one else FeatureChoiceSAE
    importance: Any = "token_norm" if gate.relative else "affinity"
    exponent = 0.0 if gate.discount is None else gate.discount.exponent
    return kind(d_model, n_features, k, rank_discount=exponent, importance=importance, **normalize)


def _scale(sae: SparseAutoencoder) -> Tensor:
    """Return what activations are multiplied by: if each is normalised, those of sqrt(d_model)."""
    like = torch.ones(1, sae.d_model, device=sae.input_scale.device)
    return sae.scales(like).double().cpu().squeeze()
