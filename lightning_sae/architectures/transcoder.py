"""Transcoders: Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944.

With a skip connection: Paulo et al. 2025, https://arxiv.org/abs/2501.18823.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sae.architectures.feature_choice import FeatureChoiceSAE
from lightning_sae.architectures.jumprelu import JumpReLUSAE
from lightning_sae.architectures.mutual_choice import MutualChoiceSAE
from lightning_sae.architectures.topk import TopKSAE
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.core.decoder import Decoder
from lightning_sae.core.input_scaling import ScaledInputs
from lightning_sae.core.loading import require_finite, taken_from
from lightning_sae.matches import Matches
from lightning_sae.metrics import FractionOfVarianceUnexplained
from lightning_sae.metrics.prefix_fvu import of_prefixes
from lightning_sae.numerics import typed_as
from lightning_sae.parallel import local, wide_rows
from lightning_sae.sae import Encoded, SparseAutoencoder
from lightning_sae.uncompiled import uncompiled


class Transcoder(SparseAutoencoder):
    """What reconstructs not the activations it reads but others: a target, at another site.

    The output of an MLP from its input, say, which so becomes a sum of features of that input. Any
    rule for spending matches makes one: `TopKTranscoder` and the others in this file.

    Data modules that read two sites have a token's activations at both beside each other. Wherever
    activations are asked for, (..., d_model), they may come so too, (..., d_model + d_target);
    `loss` needs both. The target has a mean and a scale of its own, one for all tokens, in which
    losses and `fvu` are measured. Affinities begin at the mean of the inputs: the encoder's origin.

    Args:
        d_model: Width of the activations that are read.
        n_features: Size of the dictionary.
        d_target: Width of the target. Default: d_model.
        skip: Whether a linear map of the input, zero at first, is added to what features stand for.
            It is one of the input as it comes, also where each token is normalised.
        options: Those of the rule, and of `lightning_sae.SparseAutoencoder`.

    Attributes:
        target: Mean and scale of the target: a `ScaledInputs`.
        origin: The encoder's, in scaled inputs, (d_model,).
        skip: The map from inputs, less their mean and scaled by one factor for all, to the scaled
            target, (d_target, d_model); None: there is none.

    Raises:
        ValueError: If a setting is out of range, or one that needs the activations themselves.
    """

    replicated: ClassVar = frozenset({"decoder.bias", "skip"})
    code_settings: ClassVar[tuple[str, ...]] = (*SparseAutoencoder.code_settings, "skip")
    origin: Tensor

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        d_target: int | None = None,
        skip: bool = False,
        **options: Any,
    ) -> None:
        d_target = d_model if d_target is None else d_target
        require_positive(d_target=d_target)
        if options.get("importance") == "gain" or options.get("multi_k_coefficient"):
            raise UsageError(
                "importance='gain' and multi_k_coefficient are of what reconstructs its inputs: a "
                "transcoder takes neither"
            )
        super().__init__(d_model, n_features, **options)
        self.d_target = d_target
        self.decoder = Decoder(d_target, n_features)
        self._gradient_form.watch(self.encoder.weight, self.decoder.weight)
        self.target = ScaledInputs(d_target)
        self.skip = nn.Parameter(torch.zeros(d_target, d_model)) if skip else None
        self.register_buffer("origin", torch.zeros(d_model, dtype=torch.float32))

    @property
    def encoder_origin(self) -> Tensor:
        """What is subtracted from scaled inputs before they are encoded, shape (d_model,)."""
        return self.origin

    @property
    def mean_activation(self) -> Tensor:
        """The means of input and target, beside each other."""
        return torch.cat([self.input_mean, self.target.input_mean])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set origins, means and scales from inputs and targets (tokens, d_model + d_target)."""
        x, target = self._both(x)
        self.origin.copy_(self.measure_inputs(x, self.layout.ranks))
        origin = self.target.measure_inputs(target, self.layout.ranks)
        local(self.decoder.bias).copy_(origin)
        self.initialized.fill_(True)

    def scaled(self, x: Tensor) -> Tensor:
        """Return inputs, which may have targets beside them, in the units that are encoded."""
        return super().scaled(self._input(x))

    def scales(self, like: Tensor | None = None) -> Tensor:
        """Return the factor of all targets."""
        return self.target.input_scale

    def targets(self, x: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled targets, whole and less what the skip connection makes of inputs."""
        _, target = self._both(x)
        whole = self.target.scaled(target).to(scaled)
        return whole, whole - self.skipped(x)

    def skipped(self, x: Tensor) -> Tensor | float:
        """Return what is added to what features stand for, scaled, (..., d_target); 0 without skip.

        Args:
            x: Inputs, as they come.
        """
        if self.skip is None:
            return 0.0
        with torch.autocast(x.device.type, enabled=False):
            (skip,) = wide_rows(self.skip)
            return ((self._input(x).to(skip) - self.input_mean) * self.input_scale) @ skip.T

    def loss(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its figures, as of an SAE, with the target's error.

        Args:
            x: Inputs, shape (..., d_model), or with targets beside them.
            target: The targets, shape (..., d_target), if they are not there.
        """
        return super().loss(x if target is None else torch.cat([x, target.to(x)], dim=-1))

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of the targets, (..., d_target), in the dtype of inputs.

        Where inputs have targets beside them, what comes out has the inputs beside it.
        """
        rows = x.reshape(-1, x.shape[-1])
        found = typed_as(self.reconstruct_targets(rows, self.match(rows)), x)
        return self._as_given(rows, found).view(*x.shape[:-1], -1)

    def reconstruct_targets(self, x: Tensor, matches: Matches) -> Tensor:
        """Return what matches, and the skip connection, stand for in the units of the targets."""
        return (self.reconstruct(matches) + self.skipped(x)) / self.scales()

    def decode(self, codes: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the targets (..., d_target) that codes (..., n_features) stand for.

        Args:
            codes: As `encode` returns them.
            like: The inputs that were encoded; needed only with a skip connection.

        Raises:
            ValueError: If they are needed.
        """
        found = super().decode(codes)
        if self.skip is None:
            return found
        if like is None:
            raise UsageError("skip=True: decode takes inputs too, decode(codes, like=x)")
        return typed_as(found + self.skipped(like) / self.scales(), codes)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of a validation or test, of which FVUs are of the target."""
        group = self.layout.ranks.group
        fvu = FractionOfVarianceUnexplained(self.d_target, process_group=group)
        of_target = of_prefixes(self.d_target, self.prefixes, process_group=group)
        return super().configure_metrics() | {"fvu": fvu} | of_target

    def measure(self, x: Tensor) -> Encoded:
        """Measure on inputs with targets beside them, and return what was made of them."""
        x = x.reshape(-1, x.shape[-1])
        matches = self.match(x)
        found = self.reconstruct_targets(x, matches)
        made = {"codes": matches, "reconstruction": found, "activations": self._both(x)[1]}
        self._metrics[0].update(**made, prefix_errors=self.prefix_errors(x, matches))
        return Encoded(matches, self._as_given(x, found))

    def take_over(self, state_dict: Mapping[str, Tensor]) -> None:
        """Become what another transcoder of the same shape is, by whatever rule."""
        own, names = self.state_dict(), ("target.", "origin", "skip")
        own = {name: own[name] for name in own if name.startswith(names)}
        found = taken_from(state_dict, own, f"no transcoder with d_target={self.d_target}")
        super().take_over(state_dict)
        self.load_state_dict(found, strict=False)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse also a state whose targets, origin or skip connection no training leads to."""
        super().check_state(state)
        require_finite(state, "origin", "skip", "target.input_mean")
        require_finite(state, "target.input_scale", beyond=0)

    def _massive(self, x: Tensor) -> Tensor:
        return super()._massive(self._input(x))

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model + self.d_target:
            super()._check_width(x)

    def _input(self, x: Tensor) -> Tensor:
        self._check_width(x)
        return x[..., : self.d_model]

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets.

        Raises:
            UsageError: If they are not both there.
        """
        if x.shape[-1] != self.d_model + self.d_target:
            raise UsageError(
                f"activations are {x.shape[-1]} wide: a transcoder takes inputs and targets beside "
                f"each other, d_model={self.d_model} and d_target={self.d_target} wide"
            )
        return x[..., : self.d_model], x[..., self.d_model :]

    def _as_given(self, x: Tensor, found: Tensor) -> Tensor:
        if x.shape[-1] == self.d_model:
            return found
        return torch.cat([self._input(x).to(found), found], dim=-1)


class TopKTranscoder(Transcoder, TopKSAE):
    """Token choice. Arguments are those of `Transcoder` and `TopKSAE`."""


class MutualChoiceTranscoder(Transcoder, MutualChoiceSAE):
    """Mutual Choice. Arguments are those of `Transcoder` and `MutualChoiceSAE`."""


class FeatureChoiceTranscoder(Transcoder, FeatureChoiceSAE):
    """Feature Choice. Arguments are those of `Transcoder` and `FeatureChoiceSAE`."""


class JumpReLUTranscoder(Transcoder, JumpReLUSAE):
    """JumpReLU. Arguments are those of `Transcoder` and `JumpReLUSAE`."""
