"""The parameters of every SAE, and the linear maps between activations and codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from lightning_sae.checks import require_positive
from lightning_sae.core.decoder import Decoder
from lightning_sae.core.input_scaling import NormalizeInputs, ScaledInputs
from lightning_sae.core.loading import refuse_unfit, require_finite, taken_from, told_in_one_line
from lightning_sae.core.state_format import FORMAT, upgrade_state
from lightning_sae.matches import Matches
from lightning_sae.numerics import typed_as
from lightning_sae.parallel import Layout, distribute, local, wide_rows
from lightning_sae.selection.scores import Scores
from lightning_sae.sparse import (
    EncoderScores,
    GradientForm,
    dot_rows,
    matched_affinities,
    sum_directions,
)

__all__ = ["Dictionary"]


class Dictionary(ScaledInputs):
    """Features as an encoder and a decoder of unit-norm directions, with an origin and a scale.

    With x the activations of a batch and s the input scale, the affinities of its tokens with the
    features are ``z' = (s x - b_dec) W_enc^T + b_enc``, and codes z stand for the activations
    ``(z W_dec + b_dec) / s``. With `normalize_inputs="token"` each token has an s of its own.

    What is computed is in float32, or in float64 if the parameters are, under every precision:
    affinities of 16 bits tie too often for a choice between them to mean anything.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        normalize_inputs: `lightning_sae.core.input_scaling.NormalizeInputs`.

    Attributes:
        decoder: Directions and origin: `weight` (n_features, d_model), `bias` (d_model,).
        encoder: Linear map from activations to affinities, weight of shape (n_features, d_model).
        initialized: Whether mean, scale and origin have been set, bool, 0-d.
        layout: Which processes have other tokens, and which features have their rows here.
    """

    # Private in name: torch writes it into every state dict, also a parent's, as its docs say.
    _version = FORMAT
    replicated: ClassVar = frozenset({"decoder.bias"})  # parameters that have no row a feature
    initialized: Tensor

    def __init__(
        self, d_model: int, n_features: int, normalize_inputs: NormalizeInputs = "average"
    ) -> None:
        super().__init__(d_model, normalize_inputs)
        require_positive(n_features=n_features)
        self.n_features = n_features
        self.layout = Layout.on_one_device(n_features)
        self.decoder = Decoder(d_model, n_features)
        self.encoder = nn.Linear(d_model, n_features)
        self.encoder.weight.data.copy_(self.decoder.weight.data)  # Gao et al. 2024, section 2.4
        self.encoder.bias.data.zero_()
        self.register_buffer("initialized", torch.tensor(False))
        self._gradient_form = GradientForm()
        self._gradient_form.watch(self.encoder.weight, self.decoder.weight)
        for hook in (upgrade_state, refuse_unfit):  # of a parent's `load_state_dict` too
            self.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]  # as torch has it

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 - the field's name
        """The directions, `decoder.weight`, shape (n_features, d_model)."""
        return self.decoder.weight

    @property
    def b_dec(self) -> Tensor:
        """The origin of the codes in scaled activations, `decoder.bias`, shape (d_model,)."""
        return self.decoder.bias

    @property
    def encoder_origin(self) -> Tensor:
        """What is subtracted from scaled activations before they are encoded, shape (d_model,)."""
        return self.decoder.bias

    def share_out(self, mesh: DeviceMesh) -> None:
        """Keep the parameters of some features only: each process of a mesh has its own.

        From then on all of them must call the same methods in the same order. Does nothing if
        features are shared out already.

        Args:
            mesh: As for `Layout.on_mesh`.

        Raises:
            ValueError: If there are more processes than features.
        """
        if self.layout.share.mesh is None:
            self.layout = Layout.on_mesh(self.n_features, mesh)
            distribute(self, self.layout.share, self.replicated)
            self._gradient_form.watch(self.encoder.weight, self.decoder.weight)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the origin, `input_mean` and `input_scale` from activations (tokens, d_model).

        `loss` does so with the first training batch; call it before for a larger sample. Under
        data parallelism the sample is that of all ranks.

        Raises:
            ValueError: If all activations are equal, not finite, or not d_model wide.
        """
        origin = self.measure_inputs(x, self.layout.ranks)
        local(self.decoder.bias).copy_(origin)
        self.initialized.fill_(True)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state that no training leads to; extend it for buffers of one's own.

        Args:
            state: What is to be loaded, by the names it has here; tensors may be left out.

        Raises:
            UsageError: If a value is out of range; the message names it.
        """
        weights = [name for name in state if name.startswith(("encoder.", "decoder."))]
        require_finite(state, *weights, "input_mean")
        require_finite(state, "input_scale", beyond=0)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as torch does, and say in one line what is missing or has another shape.

        Raises:
            UsageError: If something does, or `check_state` refuses.
        """
        with told_in_one_line():
            return super().load_state_dict(state_dict, strict, assign)

    def take_over(self, state_dict: Mapping[str, Tensor]) -> None:
        """Become what another SAE of the same shape is, of whatever architecture.

        Its parameters, scale and history are taken over; what else it has is its architecture's.

        Args:
            state_dict: Its state dict.

        Raises:
            ValueError: If something is missing, or has another shape; then nothing has changed.
        """
        shared = ("encoder.", "decoder.", "history.", "input_", "initialized")
        own = {name: t for name, t in self.state_dict().items() if name.startswith(shared)}
        who = f"no SAE with d_model={self.d_model}, n_features={self.n_features}"
        self.load_state_dict(taken_from(state_dict, own, who), strict=False)

    def normalize_decoder(self) -> None:
        """Give every row of the decoder unit norm again. Call it after each optimizer step."""
        self.decoder.normalize()

    def leave_gradients_in_parts(self, wanted: bool = True) -> None:
        """Leave the gradients of the two matrices as `RowGradient`s, or form them (the default).

        Any optimizer can step by them; only `ChunkedAdam` does not form them to do so.
        """
        self._gradient_form.in_parts = wanted

    def decode(self, codes: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the activations (..., d_model) that codes (..., n_features) stand for.

        Args:
            codes: As `encode` returns them.
            like: Activations (..., d_model), those that were encoded or others: what comes out has
                their length. Needed only if each token is normalised.

        Returns:
            In the dtype of the codes if that is a floating-point type.

        Raises:
            ValueError: If each token is normalised and it is not known to what length.
        """
        share = self.layout.share
        with torch.autocast(codes.device.type, enabled=False):
            weight, origin = wide_rows(self.decoder.weight, self.decoder.bias)
            directions = functional.normalize(weight, dim=1)
            (same,) = share.fan_out(codes)
            own = same[..., share.here].to(directions.dtype)
            x = (share.sum(own @ directions) + origin) / self.scales(like)
        return typed_as(x, codes)

    @torch.no_grad()
    def affinities_of(self, scaled: Tensor, matches: Matches) -> Tensor:
        """Return the affinities (matches,) of pairs that were chosen by something else."""
        share = self.layout.share
        with torch.autocast(scaled.device.type, enabled=False):
            weight, bias, origin = self._encoder()
            own = share.own(matches)
            values = dot_rows(scaled - origin, own.token, weight, own.feature) + bias[own.feature]
            return share.complete(values, matches)

    @torch.no_grad()
    def weighted_scores(
        self, scaled: Tensor, features: Tensor, weights: Tensor
    ) -> tuple[Scores, Tensor]:
        """Return what some features are chosen by if each has a weight.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
            features: Numbers of the features, ascending, int64, shape (some,).
            weights: One a feature of all, shape (n_features,).

        Returns:
            Their weighted affinities (tokens, some), and their weights, shape (some,).
        """
        share, own = self.layout.share.among(features)
        weight, bias, origin = self._encoder()
        weight, bias = weight[own], bias[own]  # copies
        factor = weights[features].to(bias)
        here = factor[share.here]
        weight.mul_(here.unsqueeze(1))
        return EncoderScores(scaled - origin, weight, bias * here, share=share), factor

    def with_gradient(self, scaled: Tensor, matches: Matches) -> Matches:
        """Return matches whose values, chosen without autograd, have the encoder's gradient."""
        share = self.layout.share
        with torch.autocast(scaled.device.type, enabled=False):
            bias, origin = wide_rows(self.encoder.bias, self.encoder_origin)
            x, origin = share.fan_out(scaled, origin)
            own, weight = share.own(matches), local(self.encoder.weight)
            in_parts = self._gradient_form.may_come_in_parts(self.encoder.weight)
            values = matched_affinities(x, origin, weight, bias, own, in_parts=in_parts)
        return matches.with_values(share.put(values, matches))

    def mean_affinities(self, scaled: Tensor) -> Tensor:
        """Return each feature's affinity (n_features,), on average over tokens, with its gradient.

        Args:
            scaled: Scaled activations, shape (tokens, d_model).
        """
        share = self.layout.share
        with torch.autocast(scaled.device.type, enabled=False):
            weight, bias, origin = self._encoder()
            mean, origin = share.fan_out(scaled.sum(0) / max(1, len(scaled)), origin)
            return share.whole(weight @ (mean - origin) + bias)

    def sum_directions(self, matches: Matches, *, frozen: bool = False) -> Tensor:
        """Add up the directions (tokens, d_model) that matches stand for, without the origin.

        Stored rows have unit norm between steps; that their directions are added up makes it true
        in any training loop, and the gradient of each row orthogonal to it. `frozen`: it has none.
        """
        share = self.layout.share
        with torch.autocast(matches.value.device.type, enabled=False):
            in_parts = self._gradient_form.may_come_in_parts(self.decoder.weight)
            weight = local(self.decoder.weight)
            weight = weight.detach() if frozen else weight
            return share.sum(sum_directions(share.own(matches), weight, in_parts=in_parts))

    @torch.no_grad()
    def along_directions(self, rows: Tensor, matches: Matches) -> Tensor:
        """Return how far the row of each match's token goes along its feature's direction.

        Args:
            rows: Shape (tokens, d_model).
            matches: Pairs of their tokens and features, in any order.

        Returns:
            Dot products with directions, float32 or as wide as these, shape (matches,).
        """
        share = self.layout.share
        with torch.autocast(rows.device.type, enabled=False):
            (weight,) = wide_rows(self.decoder.weight)
            own = share.own(matches)
            norms = torch.linalg.vector_norm(weight, dim=1).clamp_min(1e-12)
            dots = dot_rows(rows.to(weight), own.token, weight, own.feature)
            return share.complete(dots / norms[own.feature], matches)

    def reconstruct(self, matches: Matches, *, frozen: bool = False) -> Tensor:
        """Return the scaled activations (tokens, d_model) that matches stand for.

        Where the decoder is `frozen`, it gets no gradient: only the values of the matches do.
        """
        (origin,) = wide_rows(self.decoder.bias)
        return self.sum_directions(matches, frozen=frozen) + (origin.detach() if frozen else origin)

    def _encoder(self) -> tuple[Tensor, ...]:
        """Return weight, bias and origin of the encoder, of the features here."""
        return wide_rows(self.encoder.weight, self.encoder.bias, self.encoder_origin)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hook the parameters of a copy: copying and pickling leave hooks of tensors out."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._gradient_form.watch(self.encoder.weight, self.decoder.weight)
