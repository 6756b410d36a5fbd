"""How many features never fire."""

import torch
from torch import Tensor

from lightning_sae.metrics.density import FeatureDensity


class DeadFeatures(FeatureDensity):
    """Share of features that fired on none of the tokens seen.

    It is only as good as the number of tokens: a feature of density p passes for dead with
    probability (1 - p)^tokens, so it takes 3 / p tokens to see it with a probability of 95 %. The
    literature counts over 10 million tokens. Report `tokens` beside the share.

    ``update`` takes codes as `FeatureDensity` does. ``compute`` returns a float32 scalar, NaN
    before the first token. Same arguments, errors and states as `FeatureDensity`, with which it
    shares its counting in a `MetricCollection`.

    Example:
        >>> dead = DeadFeatures(4)
        >>> dead.update(torch.tensor([[0.5, 0.0, 2.0, 0.0], [0.0, 0.0, 0.1, 0.1]]))
        >>> dead.compute(), dead.tokens
        (tensor(0.2500), tensor(2))
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the share of features that never fired."""
        return _dead_compute(self.fires, self.tokens)


def _dead_compute(fires: Tensor, tokens: Tensor) -> Tensor:
    share = (fires == 0).float().mean()
    return share.where(tokens > 0, torch.nan)  # without a token none had the chance to fire
