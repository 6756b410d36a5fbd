"""The terms a training loss is made of.

All work on activations scaled so that a centred token has a mean squared length of d_model. Then
`reconstruction_loss` is close to the fraction of variance unexplained, and coefficients mean the
same thing for every language model and layer.
"""

import torch
from torch import Tensor

from lightning_sae.allocation import Matches, token_choice
from lightning_sae.distributed import mean_over_ranks
from lightning_sae.sparse import sum_directions


def reconstruction_loss(error: Tensor) -> Tensor:
    """Return the mean squared error over tokens and dimensions.

    Args:
        error: Activations less their reconstruction, shape (tokens, d_model).
    """
    return error.square().mean()


def sparsity_loss(matches: Matches, d_model: int) -> Tensor:
    """Return the L1 norm of the codes, averaged over tokens, per dimension of the activations.

    The decoder rows have unit norm, so this is the penalty of Bricken et al. (2023); the division
    by d_model matches the mean in `reconstruction_loss`.

    Args:
        matches: The codes of a batch.
        d_model: Width of the activations.
    """
    return matches.value.sum() / (matches.shape[0] * d_model)


def aux_k_loss(affinities: Tensor, error: Tensor, dictionary: Tensor, k_aux: int) -> Tensor:
    """Return how badly dead features model what the live ones left unexplained.

    Each token picks its `k_aux` dead features of largest affinity to reconstruct its error; the
    error is detached, so that dead features move, encoder and decoder alike, and live ones do
    not. The squared error is divided by the variance of the target, so 1 means that nothing is
    explained.
    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.

    Args:
        affinities: Affinities of the dead features alone, shape (tokens, dead).
        error: Activations less their reconstruction, shape (tokens, d_model).
        dictionary: Decoder rows of the dead features, of any norm, shape (dead, d_model).
        k_aux: Dead features a token may use; all of them if there are fewer.

    Returns:
        0-d tensor; zero if there is no dead feature, or nothing left to explain.

    Example:
        >>> error = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> aux_k_loss(torch.tensor([[0.5], [-0.5]]), error, torch.tensor([[1.0, 0.0]]), k_aux=1)
        tensor(0.6250)
    """
    dead = dictionary.shape[0]
    if dead == 0:
        return affinities.sum() * 0.0
    target = error.detach()
    mean = mean_over_ranks(target.mean(0))
    variance = mean_over_ranks((target - mean).square().mean())
    weight = torch.where(variance > 0, 1 / variance, 0.0)  # a branch would wait for the device
    matches = token_choice(affinities, min(k_aux, dead))
    return (target - sum_directions(matches, dictionary)).square().mean() * weight


def aux_zipf_loss(
    affinities: Tensor,
    error: Tensor,
    dictionary: Tensor,
    deficits: Tensor,
    *,
    k_aux: int,
    dying_below: float,
) -> Tensor:
    """Return how badly dead and dying features model what the healthy ones left unexplained.

    A feature's deficit is the share by which it falls short of its Zipf density (`zipf_deficit`):
    1 for a dead one; a feature is dying if it is alive and its deficit exceeds `1 - dying_below`.
    Dead and dying features each reconstruct the error as in `aux_k_loss`, and the two losses are
    added. Each group has slots of its own: in a common pool the dying, which have the larger
    affinities, leave none to the dead. The dying have fewer, so that each aims at whole features.

    Codes of the dying are weighted by their deficits before they are decoded. The dead are asked
    for `1 / (1 - dying_below)` times the error, as much as a weight like that of the healthiest of
    the dying would ask. A dead feature that modelled the error as it is would never fire: what the
    choice of matches left out lies, feature by feature, below its threshold. Either squared error
    is divided by the variance of the error itself.

    As `dying_below` goes to zero there are no dying features left, and the dead are asked for the
    error as it is: at zero this is `aux_k_loss` exactly.
    Source: Ayonrinde 2024 (arXiv 2411.02124) names this loss as a generalisation of `aux_k_loss`
    to underused features. Its formula was not available; this one is a reconstruction.

    Args:
        affinities: Affinities of the dead features, then of the dying, shape (tokens, features).
        error: Activations less their reconstruction, shape (tokens, d_model).
        dictionary: Decoder rows of the same features in the same order, (features, d_model).
        deficits: Deficits of the dying features, the last of the others, shape (dying,).
        k_aux: Dead features a token may use. It may use an eighth as many dying ones, at least one.
        dying_below: Share of its Zipf density under which a feature is dying, 0 to less than 1.

    Returns:
        0-d tensor; zero if no feature is dead or dying, or nothing is left to explain.

    Raises:
        ValueError: If `dying_below` is out of range.

    Example:
        >>> error = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> affinities, rows = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.eye(2)[[0, 0]]
        >>> aux_zipf_loss(affinities, error, rows, torch.tensor([0.6]), k_aux=8, dying_below=0.5)
        tensor(2.5800)
    """
    if not 0 <= dying_below < 1:
        raise ValueError(f"dying_below={dying_below} is a share of a density: 0 to less than 1")
    dead = len(dictionary) - len(deficits)
    gain = 1 / (1 - dying_below)
    of_dead = aux_k_loss(affinities[:, :dead], gain * error, dictionary[:dead], k_aux)
    weighted = affinities[:, dead:] * deficits
    of_dying = aux_k_loss(weighted, error, dictionary[dead:], max(1, k_aux // 8))
    return gain**2 * of_dead + of_dying  # aux_k_loss divides by the variance of its target
