"""The terms that every training loss is made of.

All work on activations scaled so that a centred token has a mean squared length of d_model. Then
`reconstruction_loss` is close to the fraction of variance unexplained, and coefficients mean the
same thing for every language model and layer.
"""

from torch import Tensor

from lightning_sae.matches import Matches


def reconstruction_loss(error: Tensor) -> Tensor:
    """Return the mean squared error over tokens and dimensions; 0 if there are no tokens.

    Args:
        error: Activations less their reconstruction, shape (tokens, d_model).
    """
    squares = error.square()
    return squares.mean() if len(error) else squares.sum()  # a mean of nothing would be NaN


def sparsity_loss(matches: Matches, d_model: int) -> Tensor:
    """Return the L1 norm of the codes, averaged over tokens, per dimension of the activations.

    The decoder rows have unit norm, so this is the penalty of Bricken et al. (2023); the division
    by d_model matches the mean in `reconstruction_loss`.

    Args:
        matches: The codes of a batch.
        d_model: Width of the activations.
    """
    return matches.value.sum() / (max(1, matches.shape[0]) * d_model)
