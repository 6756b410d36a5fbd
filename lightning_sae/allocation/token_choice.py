"""Token choice: every token takes the k features of largest affinity, or TopK.

Source: Makhzani and Frey 2013 (arXiv 1312.5663); for the activations of transformers Gao et al.
2024 (arXiv 2406.04093).
"""

from lightning_sae.allocation.affinities import Affinities, as_scores, valued
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.selection import largest_of_each_token


def token_choice(affinities: Affinities, k: int) -> Matches:
    """Let every token choose its k features of largest affinity.

    Tokens know nothing of each other, so it does not matter which of them are on other ranks.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        k: Matches a token may take, 1 to features.

    Raises:
        ValueError: If k is out of range or the affinities are not two-dimensional.
        FloatingPointError: If an affinity is NaN or infinite.

    Example:
        >>> import torch
        >>> token_choice(torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, -2.0]]), k=2).to_dense()
        tensor([[3.0000, 0.0000, 2.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    scores = as_scores(affinities)
    features = scores.shape[1]
    if not 1 <= k <= features:
        raise UsageError(f"k={k} is out of range: a token has 1 to {features} features to choose")
    return valued(largest_of_each_token(scores, k), affinities)
