"""The parameters of every architecture, and the linear maps between activations and codes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from lightning_sae import numerics
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.matches import Matches
from lightning_sae.numerics import widest_float
from lightning_sae.parallel.legacy import sum_over_ranks
from lightning_sae.parallel.share import Share, distribute, local, share_features
from lightning_sae.sparse import (
    GradientCollector,
    RowGradient,
    dot_rows,
    gradient_parts,
    is_dense,
    matched_affinities,
    sum_directions,
)


class Dictionary(pl.LightningModule):
    """Features as an encoder and unit-norm decoder directions, with an origin and a scale.

    With x the activations of a batch and s the input scale, the affinities of its tokens with the
    features are ``z' = (s x - b_dec) W_enc^T + b_enc``, and codes z stand for the activations
    ``(z W_dec + b_dec) / s``.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.

    Attributes:
        encoder: Linear map from activations to affinities, weight of shape (n_features, d_model).
        W_dec: Dictionary, one unit-norm row a feature, shape (n_features, d_model).
        b_dec: Origin of the codes in scaled activations, shape (d_model,).
        input_mean: Mean of the first training batch, in the units of the activations, (d_model,).
        input_scale: Factor s applied to activations before they are encoded, 0-d.
        initialized: Whether mean, scale and `b_dec` have been set, bool, 0-d.
        share: Which features have their rows in this process: all, until they are shared out.
    """

    input_mean: Tensor
    input_scale: Tensor
    initialized: Tensor
    _collector: GradientCollector | None = None  # in `one_gradient`

    def __init__(self, d_model: int, n_features: int) -> None:
        super().__init__()
        require_positive(d_model=d_model, n_features=n_features)
        self.d_model = d_model
        self.n_features = n_features
        directions = functional.normalize(torch.randn(n_features, d_model), dim=1)
        self.encoder = nn.Linear(d_model, n_features)
        # tied at the start: Gao et al. 2024, section 2.4
        self.encoder.weight.data.copy_(directions)
        self.encoder.bias.data.zero_()
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.share = Share((n_features,))
        # float32 also where the default is a 16-bit type
        self.register_buffer("input_mean", torch.zeros(d_model, dtype=torch.float32))
        self.register_buffer("input_scale", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))

    def share_out(self, mesh: DeviceMesh) -> None:
        """Keep the parameters of some features only: each process of the mesh has its own.

        From then on all of them must read the same tokens, and call the same methods in the same
        order. Does nothing if features are shared out already.

        Args:
            mesh: The processes, one-dimensional.

        Raises:
            ValueError: If there are more processes than features.
        """
        if self.share.mesh is None:
            self.share = share_features(self.n_features, mesh)
            distribute(self, self.share, replicated=frozenset({"b_dec"}))

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
            raise UsageError(
                f"activations with variance {variance.item()} cannot be scaled: "
                "they must be finite and not all the same"
            )
        scale = (self.d_model / variance).sqrt()
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale)
        local(self.b_dec).copy_(mean * scale)
        self.initialized.fill_(True)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every row of `W_dec` unit norm again. Call it after each optimizer step."""
        rows = local(self.W_dec)
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12))

    def affinities(self, scaled: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the affinities of scaled activations with the features here, or with some.

        In float32 or wider under every precision, because 16-bit affinities tie too often for a
        choice between them to mean anything.

        Args:
            scaled: Shape (tokens, d_model).
            features: Indices of the features wanted among those here, int64.

        Returns:
            Shape (tokens, features).
        """
        with torch.autocast(scaled.device.type, enabled=False):
            weight, bias = self._encoder()
            if features is not None:
                weight, bias = weight[features], bias[features]
            centred = self.share.fan_out(scaled - wide(self.b_dec))
            return functional.linear(centred, weight, bias)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the activations (..., d_model) that codes (..., n_features) stand for."""
        with torch.autocast(codes.device.type, enabled=False):
            dictionary = functional.normalize(wide(self.W_dec), dim=1)
            own = self.share.fan_out(codes)[..., self.share.here].to(dictionary.dtype)
            return (self.share.sum(own @ dictionary) + wide(self.b_dec)) / self.input_scale

    def scaled(self, x: Tensor) -> Tensor:
        """Return activations (tokens, d_model) in units in which codes are computed, float32.

        Raises:
            ValueError: If x is not d_model wide.
        """
        self._check_width(x)
        return wide(x) * self.input_scale

    @torch.no_grad()
    def affinities_of(self, scaled: Tensor, matches: Matches) -> Tensor:
        """Return the affinities (matches,) of pairs that were chosen by something else."""
        with torch.autocast(scaled.device.type, enabled=False):
            weight, bias = self._encoder()
            centred = scaled - wide(self.b_dec)
            own = self.share.own(matches)
            values = dot_rows(centred, own.token, weight, own.feature) + bias[own.feature]
            return self.share.complete(values, matches)

    def with_gradient(self, scaled: Tensor, matches: Matches) -> Matches:
        """Return matches whose values, chosen without autograd, have the encoder's gradient."""
        with torch.autocast(scaled.device.type, enabled=False):
            x, origin = self.share.fan_out(scaled), self.share.fan_out(wide(self.b_dec))
            own, bias = self.share.own(matches), wide(self.encoder.bias)
            weight, parts = self._with_parts(self.encoder.weight, own)
            values = matched_affinities(x, origin, weight, bias, own, parts)
        return matches.with_values(self.share.put(values, matches))

    def sum_directions(self, matches: Matches) -> Tensor:
        """Add up the directions (tokens, d_model) that matches stand for, without the origin.

        Stored rows have unit norm between steps; that their directions are added up makes it true
        in any training loop, and keeps the gradient of each row orthogonal to it.
        """
        with torch.autocast(matches.value.device.type, enabled=False):
            own = self.share.own(matches)
            return self.share.sum(sum_directions(own, *self._with_parts(self.W_dec, own)))

    def reconstruct(self, matches: Matches) -> Tensor:
        """Return the scaled activations (tokens, d_model) that matches stand for."""
        return self.sum_directions(matches) + wide(self.b_dec)

    @contextmanager
    def one_gradient(self) -> Iterator[GradientCollector]:
        """Have all terms computed within make one gradient of each matrix.

        Yields:
            What to give the sum of the terms to, before its backward pass.
        """
        self._collector = GradientCollector(wide)
        try:
            yield self._collector
        finally:
            self._collector = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those left in parts for `ChunkedAdam` too."""
        super().zero_grad(set_to_none)
        for parameter in self.parameters():
            parts = gradient_parts(parameter)
            if parts:
                parts.clear()

    def _with_parts(
        self, parameter: Tensor, matches: Matches
    ) -> tuple[Tensor, list[RowGradient] | None]:
        """Return a parameter's rows, and where matches leave their part of its gradient, if so."""
        kept = gradient_parts(parameter)
        if self._collector is None or not torch.is_grad_enabled():
            return wide(parameter), kept
        rows, parts = self._collector.collect(parameter)
        tokens, features = matches.shape
        # A part keeps a table of all tokens: if that is larger, the gradient itself is cheaper.
        whole = kept is None and (is_dense(matches) or tokens >= features)
        return rows, None if whole else parts

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return wide(self.encoder.weight), wide(self.encoder.bias)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise UsageError(f"activations are {x.shape[-1]} wide, expected d_model={self.d_model}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Dictionary":
        """Move buffers between devices, but keep them in float32 when weights become 16-bit."""
        exact = {n: b for n, b in self.named_buffers(recurse=False) if b.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self


def wide(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor in float32, or in float64 if that is what it is."""
    return numerics.wide(local(tensor))
