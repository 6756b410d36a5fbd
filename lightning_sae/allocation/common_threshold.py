"""The one threshold above which a batch has as many pairs as a budget says."""

import torch
from torch import Tensor

from lightning_sae.allocation.affinities import Affinities, as_scores
from lightning_sae.allocation.mutual_choice import mutual_choice
from lightning_sae.parallel import Ranks


def common_threshold(affinities: Affinities, budget: int, *, ranks: Ranks | None = None) -> Tensor:
    """Return the smallest affinity that `mutual_choice` takes, without a gradient.

    Args:
        affinities: Encoder outputs before allocation, shape (tokens, features).
        budget: As in `mutual_choice`, which also says what is raised.
        ranks: As in `mutual_choice`.

    Returns:
        0-d, the same on all ranks; zero if nothing is positive, or the budget is.

    Example:
        >>> common_threshold(torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.5, -2.0]]), budget=3)
        tensor(1.)
    """
    chosen = mutual_choice(as_scores(affinities), budget, ranks=ranks).value
    smallest = torch.cat([chosen, chosen.new_tensor([torch.inf])]).min()
    if ranks is not None:
        smallest = ranks.all_reduce(smallest, "min")
    return smallest.nan_to_num(posinf=0.0)
