"""Change the features of a model's activations while it runs.

All of these are context managers, for any run of the model within: `forward`, `generate`, a
metric's. A feature's contribution to an activation is its value times its direction, divided by
the factor by which the SAE scales its inputs (`scales`). Values are in the units in which `encode`
and `match` give them, whatever that factor is. With `normalize_inputs="token"` it is another for
each token, so the same value moves a long activation further than a short one, in proportion to
their lengths; with `average` it moves both alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.core import Autoencoder
from lightning_sae.interventions.positions import Positions, watched
from lightning_sae.matches import Matches
from lightning_sae.residual_stream import ResidualStream

__all__ = ["ablate", "clamp", "splice", "steer"]


def splice(
    stream: ResidualStream, sae: Autoencoder, *, error: bool = False, where: Tensor | None = None
) -> AbstractContextManager[None]:
    """Put the reconstruction in place of the activations.

    Args:
        stream: The layer of a model on which the SAE was trained. Its model may be of another dtype
            than the SAE, and on another device.
        sae: Any SAE of this package, or one that `lightning_sae.interop` imported.
        error: Whether to add what the reconstruction lacks, which leaves activations as they are.
        where: Which tokens to change: a bool mask, (contexts, length), or (1, length) for contexts
            that are alike. Columns are those of the whole text, padding included, also where a
            cache holds the first of them; what comes after the last column is not changed. None:
            all but special tokens (those in the SAE's record, or else the first, the last and the
            padding token of the model's configuration), padding, and the first token of each
            context: SAEs are not trained on them.

    Raises:
        UsageError: If `where` is no such mask, or the model did not run in the block.
    """
    return _changed(stream, sae, _Change(sae, error), where)


def ablate(
    stream: ResidualStream,
    sae: Autoencoder,
    features: Iterable[int],
    *,
    error: bool = True,
    where: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Take away what features contribute.

    Where none of them fires, nothing changes.

    Args:
        stream: As in `splice`.
        sae: As in `splice`.
        features: Their numbers.
        error: Whether all else of the activation stays as it is. False: it is what the remaining
            features reconstruct.
        where: As in `splice`.

    Raises:
        UsageError: As in `splice`, or if there is no such feature.
    """
    return _changed(stream, sae, _Change.of(sae, dict.fromkeys(features, 0.0), error), where)


def clamp(
    stream: ResidualStream,
    sae: Autoencoder,
    values: Mapping[int, float],
    *,
    error: bool = True,
    where: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Put features at values, whether they fire or not.

    What they contribute is taken away, and what these values contribute is added. To encode the
    result may give other values: features that share a direction answer to each other's.

    Args:
        stream: As in `splice`.
        sae: As in `splice`.
        values: Value of each feature, in the units of `encode`. 0 is to ablate it.
        error: As in `ablate`.
        where: As in `splice`.

    Raises:
        UsageError: As in `ablate`, or if a value is not finite.
    """
    return _changed(stream, sae, _Change.of(sae, values, error), where)


def steer(
    stream: ResidualStream,
    sae: Autoencoder,
    values: Mapping[int, float],
    *,
    error: bool = True,
    where: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Add to features: move activations along their directions.

    Args:
        stream: As in `splice`.
        sae: As in `splice`.
        values: What to add to each feature, in the units of `encode`: a feature's highest value on
            text is a strong push. May be negative.
        error: As in `ablate`.
        where: As in `splice`.

    Raises:
        UsageError: As in `clamp`.
    """
    return _changed(stream, sae, _Change.of(sae, values, error, taken=False), where)


@dataclass(frozen=True)
class _Change:
    """What is done to activations: codes of features are taken away, others are put in.

    Attributes:
        sae: What gives them.
        error: Whether what the reconstruction lacks stays.
        given: The codes to put in, of a single token. None: none.
        taken: The features whose codes are taken away, int64.
    """

    sae: Autoencoder
    error: bool
    given: Matches | None = None
    taken: Tensor | None = None

    @classmethod
    def of(
        cls, sae: Autoencoder, values: Mapping[int, float], error: bool, *, taken: bool = True
    ) -> _Change:
        pairs = sorted((index(feature), float(value)) for feature, value in values.items())
        for feature, value in pairs:
            if not 0 <= feature < sae.n_features:
                raise UsageError(f"feature {feature} is none of n_features={sae.n_features}")
            if not math.isfinite(value):
                raise UsageError(f"feature {feature}={value} must be a finite number")
        device = sae.decoder.weight.device
        features = torch.tensor([feature for feature, _ in pairs], device=device).long()
        added = torch.tensor([value for _, value in pairs], device=device)
        token = torch.zeros_like(features)
        given = Matches(token, features, added, (1, sae.n_features)).select(added != 0)
        return cls(sae, error, given if len(given) else None, features if taken else None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return activations (tokens, d_model) as they are to be."""
        sae, scales = self.sae, self.sae.scales(x)
        if self.taken is not None or not self.error:
            matches = sae.match(x)
        if not self.error:
            x = sae.reconstruct(matches) / scales
        if self.taken is not None:
            fires = matches.select(torch.isin(matches.feature, self.taken))
            x = x - sae.sum_directions(fires) / scales
        if self.given is not None:
            x = x + sae.sum_directions(self.given) / scales
        return x


@contextmanager
def _changed(
    stream: ResidualStream, sae: Autoencoder, change: _Change, where: Tensor | None
) -> Iterator[None]:
    if sae.d_model != stream.d_model:
        raise UsageError(f"d_model={sae.d_model} of the SAE: the layer is {stream.d_model} wide")
    positions = Positions.of(stream, sae, where)
    device = sae.decoder.weight.device

    with watched(stream) as run:

        def edit(x: Tensor) -> Tensor:  # (contexts, new tokens, d_model)
            here = positions.among(x, run)
            edited = x.clone()
            edited[here] = change(x[here].to(device)).to(x)
            return edited

        with stream.editing(edit):
            yield
