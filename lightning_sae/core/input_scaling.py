"""The units in which activations are encoded."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_sae.checks import UsageError, require_choice, require_positive
from lightning_sae.core.exact_buffers import ExactBuffers
from lightning_sae.core.ordinary_tokens import mean_and_variance
from lightning_sae.numerics import widest_float
from lightning_sae.parallel import Ranks

__all__ = ["NormalizeInputs", "ScaledInputs"]

NormalizeInputs = Literal["average", "token"]
"""What is brought to the same length before it is encoded:

* `average`: the average token, by one factor for all. Long tokens weigh more than short ones, in
  the choice of matches and in the loss. SAELens calls nearly the same `expected_average_only_in`;
* `token`: each token, by a factor of its own, which its reconstruction is divided by again. SAELens
  calls it `constant_norm_rescale`, OpenMOSS `token-wise`.
"""


class ScaledInputs(ExactBuffers):
    """Activations times a factor that is measured once, or follows from each token's length.

    With `average` it is the factor s by which centred tokens have a mean squared length of d_model.
    With `token` it brings each token to the length of a typical one in those units: with m the
    mean, its square is ``d_model + |s m|^2``.

    Args:
        d_model: Width of the activations.
        normalize_inputs: `NormalizeInputs`.

    Attributes:
        input_mean: m, the mean of what was measured, less its massive tokens, in the units of the
            activations, (d_model,).
        input_scale: s, 0-d.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, d_model: int, normalize_inputs: NormalizeInputs = "average") -> None:
        super().__init__()
        require_positive(d_model=d_model)
        require_choice(normalize_inputs=normalize_inputs, of=get_args(NormalizeInputs))
        self.d_model = d_model
        self.normalize_inputs = normalize_inputs
        # float32 also where the default is a 16-bit type
        self.register_buffer("input_mean", torch.zeros(d_model, dtype=torch.float32))
        self.register_buffer("input_scale", torch.tensor(1.0, dtype=torch.float32))

    def scaled(self, x: Tensor) -> Tensor:
        """Return activations (..., d_model) in units in which codes are computed, float32 or wider.

        Raises:
            ValueError: If x is not d_model wide.
        """
        self._check_width(x)
        parameter = next(self.parameters(), x)
        x = x.to(torch.promote_types(parameter.dtype, torch.float32))
        return x * self.input_scales(x)

    def scales(self, like: Tensor | None = None) -> Tensor:
        """Return what reconstructions are divided by to be in the units of activations.

        Args:
            like: As for `input_scales`, which this is where activations reconstruct themselves.
        """
        return self.input_scales(like)

    def input_scales(self, like: Tensor | None = None) -> Tensor:
        """Return the factors of tokens, by which their activations are multiplied.

        Args:
            like: The activations, shape (..., d_model); needed only if each token is normalised.

        Returns:
            Float32 or wider: 0-d for all, or one a token, (..., 1).

        Raises:
            ValueError: If activations are needed.
        """
        if self.normalize_inputs == "average":
            return self.input_scale
        if like is None:
            raise UsageError(
                "normalize_inputs='token': codes do not say how long a token was; give decode "
                "activations of that length too, decode(codes, like=x)"
            )
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        norms: Tensor = torch.linalg.vector_norm(like, dim=-1, keepdim=True)
        return self._typical_norm / norms.clamp_min(1e-12)  # of no token zero

    @torch.no_grad()
    def measure_inputs(self, x: Tensor, ranks: Ranks) -> Tensor:
        """Set `input_mean` and `input_scale`, and return the mean of activations once scaled.

        Args:
            x: Activations of this rank, shape (tokens, d_model).
            ranks: Those that have tokens of the sample.

        Returns:
            Shape (d_model,), the same on all ranks. Less massive tokens, as `input_mean` is, unless
            each token is normalised: then they are as long as the others.

        Raises:
            ValueError: If all activations are equal, not finite, or not d_model wide.
        """
        self._check_width(x)
        x = x.detach().to(widest_float(x.device))
        mean, variance = mean_and_variance(x, ranks)
        if not bool(variance.isfinite()) or not bool(variance > 0):
            raise UsageError(
                f"activations with variance {variance.item()} cannot be scaled: "
                "they must be finite and not all the same"
            )
        scale = (self.d_model / variance).sqrt()
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale)
        if self.normalize_inputs == "average":
            return mean * scale
        return mean_and_variance(x * self.input_scales(x), ranks)[0]

    @property
    def _typical_norm(self) -> Tensor:
        return (self.d_model + (self.input_mean * self.input_scale).square().sum()).sqrt()

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            several = x.shape[-1] % self.d_model == 0 < x.shape[-1]
            hint = "; SeveralSAEs trains an SAE for each of several sites" if several else ""
            raise UsageError(
                f"activations are {x.shape[-1]} wide, expected d_model={self.d_model}{hint}"
            )
