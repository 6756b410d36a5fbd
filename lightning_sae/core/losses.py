"""The terms a training loss is made of.

All work on activations scaled so that a centred token has a mean squared length of d_model. Then
`reconstruction_loss` is close to the fraction of variance unexplained, and coefficients mean the
same thing for every language model and layer.
"""

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel.legacy import mean_over_ranks


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


def aux_k_loss(error: Tensor, modelled: Tensor) -> Tensor:
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

    Returns:
        0-d tensor; zero if there is nothing left to explain.

    Example:
        >>> error = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> aux_k_loss(error, modelled=torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
        tensor(0.6250)
    """
    target = error.detach()
    mean = mean_over_ranks(target.mean(0))
    variance = mean_over_ranks((target - mean).square().mean())
    weight = torch.where(variance > 0, 1 / variance, 0.0)  # a branch would wait for the device
    return (target - modelled).square().mean() * weight


def aux_zipf_loss(
    error: Tensor, by_dead: Tensor | None, by_dying: Tensor | None, dying_below: float
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

    As `dying_below` goes to zero there are no dying features left, and the dead are asked for the
    error as it is: at zero this is `aux_k_loss` exactly.
    Source: Ayonrinde 2024 (arXiv 2411.02124) names this loss as a generalisation of `aux_k_loss`
    to underused features. Its formula was not available; this one is a reconstruction.

    Args:
        error: Activations less their reconstruction, shape (tokens, d_model).
        by_dead: What dead features make of it, in the same shape; None if no feature is dead.
        by_dying: What dying features make of it; None if none is.
        dying_below: Share of its Zipf density under which a feature is dying, 0 to less than 1.

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
        loss = gain**2 * aux_k_loss(gain * error, by_dead)
    if by_dying is not None:
        loss = loss + aux_k_loss(error, by_dying)
    return loss
