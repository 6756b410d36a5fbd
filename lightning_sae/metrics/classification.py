"""How well learned features tell where true ones fire."""

from typing import Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.metrics.directions import largest_cosines
from lightning_sae.numerics import widest_float


class FeatureClassification(TotalsMetric):
    r"""Learned features as classifiers of the true ones that they stand for.

    As SAELens' `sae_lens.synthetic.compute_classification_metrics`: each learned feature stands for
    the true one whose direction is nearest, by the size of the cosine; several may stand for one.
    Over tokens, the firings of both are compared,

    .. math:: \text{precision} = TP / (TP + FP), \quad \text{recall} = TP / (TP + FN), \quad
        F_1 = 2 PR / (P + R)

    where 0 / 0 is 0; then each is averaged over all learned features, dead ones included.

    ``update`` takes the codes of a batch and the true codes of the same tokens. ``compute`` returns
    a dictionary of float32 scalars: `feature_precision`, `feature_recall`, `feature_f1` and
    `feature_accuracy`, all NaN before the first token.

    Attributes:
        nearest: The true feature that each learned one stands for, int64, (n_features,).
        hits: Tokens on which both fired on this rank, int64, (n_features,).
        fires: Those on which the learned one fired, int64, (n_features,).
        true_fires: Those on which each true one fired, int64, (true features,).
        tokens: Tokens seen, int64.

    Args:
        learned: Rows of the decoder, (n_features, d_model).
        true: True directions, (true features, d_model).
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Raises:
        UsageError: If directions, or codes, are not of these shapes.

    Example:
        >>> metric = FeatureClassification(torch.eye(2), torch.eye(2))
        >>> def codes(*pairs):
        ...     token, feature = torch.tensor(pairs).T
        ...     return Matches(token, feature, torch.ones(len(pairs)), (4, 2))
        >>> metric.update(codes((0, 0), (1, 0), (2, 1)), codes((0, 0), (2, 1), (3, 1)))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'feature_precision': 0.75, 'feature_recall': 0.75, 'feature_f1': 0.667,
         'feature_accuracy': 0.75}
    """

    hits: Tensor
    fires: Tensor
    true_fires: Tensor
    tokens: Tensor

    def __init__(self, learned: Tensor, true: Tensor, **kwargs: Any) -> None:
        _, nearest = largest_cosines(learned, true)
        super().__init__(**kwargs)
        self.register_buffer("nearest", nearest, persistent=False)
        self.nearest: Tensor
        self.add_total("hits", len(learned))
        self.add_total("fires", len(learned))
        self.add_total("true_fires", len(true))
        self.add_total("tokens")

    def update(self, codes: Matches, truth: Matches) -> None:
        """Count firings of a batch.

        Args:
            codes: Matches of its tokens, (tokens, n_features).
            truth: Those of the true features, (tokens, true features), on the same device.
        """
        expected = (truth.shape[0], len(self.fires)), (codes.shape[0], len(self.true_fires))
        if (codes.shape, truth.shape) != expected:
            raise UsageError(
                f"codes of shape {codes.shape} and true ones of shape {truth.shape}: they must be "
                f"(tokens, {len(self.fires)}) and (tokens, {len(self.true_fires)})"
            )
        self.add_to_totals(
            hits=_hits(codes, truth, self.nearest),
            fires=codes.per_feature(),
            true_fires=truth.per_feature(),
            tokens=codes.shape[0],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return precision, recall, F1 and accuracy, means over learned features."""
        positives = self.true_fires[self.nearest]
        return _classification_compute(self.hits, self.fires, positives, self.tokens)


def _hits(codes: Matches, truth: Matches, nearest: Tensor) -> Tensor:
    """Return on how many tokens a learned feature and its true one fire both, (n_features,)."""
    codes, truth = (each.select(each.value > 0) for each in (codes, truth))
    width = truth.shape[1]
    pairs = codes.token * width + nearest[codes.feature]
    hit = torch.isin(pairs, truth.token * width + truth.feature, assume_unique=False)
    return torch.bincount(codes.feature[hit], minlength=codes.shape[1])


def _classification_compute(
    hits: Tensor, fires: Tensor, positives: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    wide = widest_float(hits.device)
    hit, fired, positive = (each.to(wide) for each in (hits, fires, positives))
    precision = (hit / fired).nan_to_num(0.0)
    recall = (hit / positive).nan_to_num(0.0)
    f1 = (2 * hit / (fired + positive)).nan_to_num(0.0)
    accuracy = (tokens - fired - positive + 2 * hit) / tokens
    means = {"precision": precision, "recall": recall, "f1": f1, "accuracy": accuracy}
    return {
        f"feature_{name}": each.mean().where(tokens > 0, torch.nan).float()
        for name, each in means.items()
    }
