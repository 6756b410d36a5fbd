"""How much a token-feature match matters: what a choice ranks pairs by.

Ayonrinde 2024 (arXiv 2411.02124) ranks by affinity, and names the assumption behind it, that a
larger affinity always matters more, as a limitation (the Monotonic Importance Heuristic). The
alternatives here are ours, for comparison. With unit-norm decoder rows that are orthogonal where
they fire together, and an encoder equal to the decoder, all but `token_norm` rank alike.
"""

from typing import Literal, get_args

from torch import Tensor

from lightning_sae.checks import UsageError

Importance = Literal["affinity", "token_norm", "gain"]
"""What pairs are ranked by:

* `affinity`: the encoder's output z';
* `token_norm`: z' / ||x - b||, so that tokens of large norm get no more than others;
* `gain`: 2 z' <x - b, w> - z'^2 ||w||^2, by how much the match alone lowers the squared error: the
  gradient of the loss in switching it on, to second order, and as the loss is quadratic exactly.
"""


def score(
    affinities: Tensor, importance: Importance, *, centred: Tensor, dictionary: Tensor
) -> Tensor:
    """Return the scores by which a choice ranks pairs; none is positive without its affinity.

    Args:
        affinities: z', shape (tokens, features).
        importance: What scores stand for.
        centred: x - b, activations less the origin of the codes, shape (tokens, d_model).
        dictionary: Decoder rows w, shape (features, d_model).

    Returns:
        Shape (tokens, features); the affinities themselves for `affinity`.

    Raises:
        ValueError: If there is no such importance.

    Example:
        >>> import torch
        >>> affinities, centred = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 4.0]])
        >>> score(affinities, "token_norm", centred=centred, dictionary=torch.eye(2))
        tensor([[0.4000, 0.2000]])
        >>> score(affinities, "gain", centred=centred, dictionary=torch.eye(2))
        tensor([[8., 7.]])
    """
    if importance == "affinity":
        return affinities
    if importance == "token_norm":
        lengths: Tensor = centred.norm(dim=1, keepdim=True).clamp_min(1e-12)  # of no token zero
        return affinities / lengths
    if importance == "gain":
        removed = 2 * (centred @ dictionary.T) - affinities * dictionary.square().sum(1)
        return affinities.clamp_min(0) * removed
    raise UsageError(f"importance={importance!r} is none of {', '.join(get_args(Importance))}")
