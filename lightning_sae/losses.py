"""The terms a training loss is made of.

All work on activations scaled so that a centred token has a mean squared length of d_model. Then
`reconstruction_loss` is close to the fraction of variance unexplained, and coefficients mean the
same thing for every language model and layer.
"""

from torch import Tensor

from lightning_sae.allocation import Matches, token_choice
from lightning_sae.sparse import weighted_sum


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
        dictionary: Decoder rows of the dead features, shape (dead, d_model).
        k_aux: Dead features a token may use; all of them if there are fewer.

    Returns:
        0-d tensor; zero if there is no dead feature, or nothing left to explain.
    """
    target = error.detach()
    variance = (target - target.mean(0)).square().mean()
    dead = dictionary.shape[0]
    if dead == 0 or not bool(variance > 0):
        return affinities.sum() * 0.0
    matches = token_choice(affinities, min(k_aux, dead))
    return (target - weighted_sum(matches, dictionary)).square().mean() / variance
