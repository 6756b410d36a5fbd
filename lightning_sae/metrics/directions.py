"""How near learned directions are to true ones."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.checks import UsageError


def largest_cosines(directions: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return how near each direction is to the nearest of others, and which that is.

    Cosines count by their size, whatever their sign, as in SAELens' `sae_lens.synthetic`.

    Args:
        directions: Of any length, (directions, d_model).
        others: As many dimensions, (others, d_model).

    Returns:
        Sizes of cosines, float32, and numbers of others, int64, both (directions,).

    Raises:
        UsageError: If shapes are not these, or there are none to compare.
    """
    if not (directions.ndim == others.ndim == 2 and directions.shape[1] == others.shape[1]):
        shapes = f"{tuple(directions.shape)} and {tuple(others.shape)}"
        raise UsageError(f"directions of shapes {shapes} must both be (directions, d_model)")
    if not (len(directions) and len(others)):
        raise UsageError("there must be at least one direction of each kind")
    unit = functional.normalize(others.detach().float(), dim=1)
    found = [
        (functional.normalize(part, dim=1) @ unit.T).abs().max(1)
        for part in directions.detach().float().split(4096)  # of millions no product fits
    ]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def direction_statistics(learned: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Return how well learned directions and true ones cover each other.

    Means of largest cosines (MMCS) are those of Sharkey et al. 2022, "Taking features out of
    superposition with sparse autoencoders", both ways; `uniqueness` is SAELens'
    `feature_uniqueness`.

    Args:
        learned: Rows of a decoder, (n_features, d_model).
        true: What they should be, (true features, d_model).

    Returns:
        0-d float32 tensors. `mmcs_true`: mean over true directions of the largest cosine with a
        learned one, low where some were not found. `mmcs_learned`: the same the other way round,
        low where some learned ones are none that is true. `uniqueness`: true directions that are
        the nearest of a learned one, as a share of the learned ones. `unmatched_fraction`: share of
        the true directions that are the nearest of none.

    Raises:
        UsageError: If shapes are not these, or there are none to compare.

    Example:
        >>> learned, true = torch.tensor([[1.0, 0], [0.8, 0.6], [2, 0]]), torch.eye(2)
        >>> {name: round(value.item(), 3) for name, value in
        ...     direction_statistics(learned, true).items()}
        {'mmcs_true': 0.8, 'mmcs_learned': 0.933, 'uniqueness': 0.333, 'unmatched_fraction': 0.5}
    """
    of_learned, nearest = largest_cosines(learned, true)
    of_true, _ = largest_cosines(true, learned)
    matched = nearest.unique().numel()
    return {
        "mmcs_true": of_true.mean(),
        "mmcs_learned": of_learned.mean(),
        "uniqueness": of_true.new_tensor(matched / len(learned)),
        "unmatched_fraction": of_true.new_tensor(1 - matched / len(true)),
    }
