"""How features that hardly fire are revived: the whole auxiliary loss.

Dead features (`aux_k_loss`, Gao et al. 2024) and dying ones (`aux_zipf_loss`, Ayonrinde 2024) learn
to reconstruct what the others leave of the activations.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sae.allocation import token_choice
from lightning_sae.checks import UsageError, require_not_negative, require_positive, require_share
from lightning_sae.core.dictionary import Dictionary
from lightning_sae.core.exact_buffers import ExactBuffers
from lightning_sae.core.firing_history import FiringHistory
from lightning_sae.core.losses import reconstruction_loss
from lightning_sae.host_copy import HostCopy, true_places
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from lightning_sae.zipf import ZipfFitError, deficit_by, fit_zipf

__all__ = ["Revival", "aux_k_loss", "aux_zipf_loss"]

FEWER_DYING = 8
"""Places for dead features in that loss, for each place for a dying one. With as many, each dying
feature would learn a small piece of what is missing; with few, it aims at whole features. Ours, and
not tuned."""


FITS = 8
"""How often the law of densities is fitted anew, in `dead_after_tokens`, over which these are
measured: it changes less than single densities do, and a fit waits for the device."""


class Revival(ExactBuffers):
    """Lets dead and dying features learn to explain the remaining error.

    Args:
        coefficient: Weight of the loss; 0 leaves it out.
        dying_below: Share of its Zipf density below which a feature counts as dying and is helped
            too (`aux_zipf_loss`); 0 helps dead ones alone (`aux_k_loss`).
        k: Dead features a token may use, and an eighth as many dying ones.
        every: One token in so many is used.

    Attributes:
        law: Scale, exponent and offset of the law of densities, if dying features are helped,
            float32, (3,); zeros while none is known, by which no feature falls short.
        fitted_at: Tokens seen when it was fitted, int64, 0-d; -1 before.

    Raises:
        ValueError: If one of them is out of range.
    """

    law: Tensor
    fitted_at: Tensor

    def __init__(self, coefficient: float, dying_below: float, k: int, every: int) -> None:
        super().__init__()
        require_positive(k_aux=k, aux_every=every)
        require_not_negative(aux_coefficient=coefficient)
        require_share(dying_below=dying_below)
        self.coefficient = coefficient
        self.dying_below = dying_below
        self.k = k
        self.every = every
        self._counts, self._fitted_at = HostCopy(), HostCopy()
        if dying_below:
            self.register_buffer("law", torch.zeros(3, dtype=torch.float32))
            self.register_buffer("fitted_at", torch.tensor(-1))
        self.register_load_state_dict_pre_hook(_forgo_law)  # type: ignore[no-untyped-call]  # as torch has it

    def loss(
        self, dictionary: Dictionary, history: FiringHistory, scaled: Tensor, error: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted loss by its name; nothing if its weight is zero.

        Args:
            dictionary: Whose features.
            history: Which of them are dead or dying.
            scaled: Scaled activations, shape (tokens, d_model).
            error: `scaled` less its reconstruction, shape (tokens, d_model).
        """
        if self.coefficient == 0:
            return {}
        self._fit(history)
        dead, dying, deficit = self._groups(history)
        counts = self._counts.read(partial(_counts, dead, dying), *self._sources(history)).tolist()
        scaled, error = scaled[:: self.every], error[:: self.every]
        places = self.k, max(1, self.k // FEWER_DYING)
        loss = aux_zipf_loss(
            error,
            _modelled(dictionary, true_places(dead, counts[0]), dead.float(), scaled, places[0]),
            _modelled(dictionary, true_places(dying, counts[1]), deficit, scaled, places[1]),
            self.dying_below,
            dictionary.layout.ranks,
            filled=(_filled(dead, places[0]), _filled(dying, places[1])),
        )
        name = "aux_zipf_loss" if self.dying_below else "aux_k_loss"
        return {name: self.coefficient * loss}

    def send(self, history: FiringHistory) -> None:
        """Have the dead and dying counted, at the end of a step, for the next one."""
        if self.coefficient:
            dead, dying, _ = self._groups(history)
            self._counts.send(_counts(dead, dying), *self._sources(history))

    def _groups(self, history: FiringHistory) -> tuple[Tensor, Tensor, Tensor]:
        """Return which features are dead, which are dying, and all deficits, (n_features,) each."""
        dead, deficit = history.dead(), self.deficit(history)
        return dead, ~dead & (deficit > 1 - self.dying_below), deficit

    def _sources(self, history: FiringHistory) -> tuple[Any, ...]:
        settings = history.dead_after_tokens, self.dying_below
        law = (self.law, history.density) if self.dying_below else ()
        return history.tokens_since_fired, *law, *settings

    def deficit(self, history: FiringHistory) -> Tensor:
        """Return by which share each feature falls short of its Zipf density, (n_features,).

        Zero for all while nothing is known: in the first `dead_after_tokens` tokens, over which
        nearly every feature would seem to fall short, or when too few features are live for a fit.
        """
        if not self.dying_below:
            return torch.zeros_like(history.density)
        return deficit_by(history.density, *self.law.unbind()).nan_to_num(0.0)

    def _fit(self, history: FiringHistory) -> None:
        """Fit the law of densities, if dying features are helped and it is time to."""
        if not self.dying_below or history.window < history.dead_after_tokens:
            return
        age = history.seen - int(self._fitted_at.of(self.fitted_at))
        if age <= history.seen and 0 <= age < history.dead_after_tokens / FITS:
            return
        self.law.zero_()
        with suppress(ZipfFitError):
            law = fit_zipf(history.density, history.window)
            self.law.copy_(self.law.new_tensor([law.scale, law.exponent, law.offset]))
        self.fitted_at.copy_(history.tokens_seen)


def aux_k_loss(error: Tensor, modelled: Tensor, ranks: Ranks | None = None) -> Tensor:
    """Return how badly dead features model what the live ones left unexplained.

    Each token picks its `k_aux` dead features of largest affinity to reconstruct its error; the
    error is detached, so that dead features move, encoder and decoder alike, and live ones do
    not. The squared error is divided by the variance of the target, so 1 means that nothing is
    explained.
    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.

    Args:
        error: Activations less their reconstruction, shape (tokens, d_model).
        modelled: What the dead features make of it, shape (tokens, d_model): the `sum_directions`
            of a `token_choice` among them.
        ranks: Over which the variance is taken. Default: this process alone.

    Returns:
        0-d tensor; zero if there is nothing left to explain.

    Example:
        >>> error = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> aux_k_loss(error, modelled=torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
        tensor(0.6250)
    """
    target = error.detach()
    mean = _average(target.mean(0), target, ranks)
    variance = _average((target - mean).square().mean(), target, ranks)
    weight = torch.where(variance > 0, 1 / variance, 0.0)  # a branch would wait for the device
    return reconstruction_loss(target - modelled) * weight


def aux_zipf_loss(
    error: Tensor,
    by_dead: Tensor | None,
    by_dying: Tensor | None,
    dying_below: float,
    ranks: Ranks | None = None,
    *,
    filled: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
) -> Tensor:
    """Return how badly dead and dying features model what the healthy ones left unexplained.

    A feature's deficit is the share by which it falls short of its Zipf density (`zipf_deficit`):
    1 for a dead one; a feature is dying if it is alive and its deficit exceeds `1 - dying_below`.
    Dead and dying features each reconstruct the error as in `aux_k_loss`, and the two losses are
    added. Each group has slots of its own: in a common pool the dying, which have the larger
    affinities, leave none to the dead. The dying have fewer, an eighth as many, so that each aims
    at whole features.

    Codes of the dying are weighted by their deficits before they are chosen and decoded. The dead
    are asked for `1 / (1 - dying_below)` times the error, as much as a weight like that of the
    healthiest of the dying would ask. A dead feature that modelled the error as it is would never
    fire: what the choice of matches left out lies, feature by feature, below its threshold. Either
    squared error is divided by the variance of the error itself.

    Each group counts by the share of its places that it can fill. A single dead feature leaves
    nearly all of the error unexplained, and without this weight the loss of a run would jump four
    times its size with it. Other libraries weight `aux_k_loss` alike; Gao et al. do not say so.

    As `dying_below` goes to zero there are no dying features left, and the dead are asked for the
    error as it is: at zero this is `aux_k_loss` exactly.
    Source: Ayonrinde 2024 (arXiv 2411.02124) names this loss as a generalisation of `aux_k_loss`
    to underused features. Its formula was not available; this one is a reconstruction.

    Args:
        error: Activations less their reconstruction, shape (tokens, d_model).
        by_dead: What dead features make of it, in the same shape; None if no feature is dead.
        by_dying: What dying features make of it; None if none is.
        dying_below: Share of its Zipf density under which a feature is dying, 0 to less than 1.
        ranks: As for `aux_k_loss`.
        filled: Weights of the two groups: the share of a token's places that the dead can fill, and
            that the dying can.

    Returns:
        0-d tensor; zero if no feature is dead or dying, or nothing is left to explain.

    Raises:
        ValueError: If `dying_below` is out of range.

    Example:
        >>> error = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> by_dead, by_dying = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.6, 0.0], [0.0, 0.0]]])
        >>> aux_zipf_loss(error, by_dead, by_dying, dying_below=0.5)
        tensor(2.5800)
    """
    if not 0 <= dying_below < 1:
        raise UsageError(f"dying_below={dying_below} is a share of a density: 0 to less than 1")
    loss = error.new_zeros(())
    if by_dead is not None:
        gain = 1 / (1 - dying_below)
        # aux_k_loss divides by the variance of its target
        loss = filled[0] * gain**2 * aux_k_loss(gain * error, by_dead, ranks)
    if by_dying is not None:
        loss = loss + filled[1] * aux_k_loss(error, by_dying, ranks)
    return loss


def _modelled(
    dictionary: Dictionary, features: Tensor, weights: Tensor, scaled: Tensor, k: int
) -> Tensor | None:
    """Return what each token's k of some features, of largest weighted affinity, add up to."""
    if not len(features):
        return None
    with torch.no_grad():
        scores, factor = dictionary.weighted_scores(scaled, features, weights)
        chosen = token_choice(scores, min(k, len(features)))
        chosen = Matches(
            chosen.token,
            features[chosen.feature],
            chosen.value / factor[chosen.feature],
            (len(scaled), dictionary.n_features),
        )
    matches = dictionary.with_gradient(scaled, chosen)
    weighted = weights.to(matches.value)[matches.feature]
    return dictionary.sum_directions(matches.with_values(matches.value * weighted))


def _forgo_law(revival: Revival, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state do without a law, or a revival: torch calls it, as one of its hooks."""
    if not revival.dying_below:
        for name in ("law", "fitted_at"):
            state_dict.pop(f"{prefix}{name}", None)
    elif f"{prefix}law" not in state_dict:  # an earlier version's, which is fitted anew
        state_dict[f"{prefix}law"] = torch.zeros_like(revival.law)
        state_dict[f"{prefix}fitted_at"] = torch.full_like(revival.fitted_at, -1)


def _counts(dead: Tensor, dying: Tensor) -> Tensor:
    return torch.stack([dead.sum(), dying.sum()])


def _filled(mask: Tensor, places: int) -> Tensor:
    return (mask.sum() / places).clamp(max=1)


def _average(mean: Tensor, over: Tensor, ranks: Ranks | None) -> Tensor:
    if ranks is None:
        return mean
    return ranks.average(mean.flatten(), len(over)).view_as(mean)
