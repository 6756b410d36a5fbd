"""What is measured against the truth is what SAELens measures."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("sae_lens")

from sae_lens.synthetic import compute_classification_metrics, feature_uniqueness
from sae_lens.util import cosine_similarities

from lightning_sae.metrics import FeatureClassification, direction_statistics
from tests.helpers.matches import matches_where


def sample(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    learned, true = torch.randn(40, 12, generator=draw), torch.randn(30, 12, generator=draw)
    codes, truth = (torch.rand(500, n, generator=draw) - 0.8 for n in (40, 30))
    codes[:, 0] = truth[:, 3] = 0  # that never fire
    return learned, true, codes.relu(), truth.relu()


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_of_features(seed: int):
    learned, true, codes, truth = sample(seed)
    metric = FeatureClassification(learned, true)
    metric.update(matches_where(codes, codes > 0), matches_where(truth, truth > 0))
    theirs = compute_classification_metrics(codes, truth, learned, true)
    expected = {
        "feature_precision": theirs.precision,
        "feature_recall": theirs.recall,
        "feature_f1": theirs.f1_score,
        "feature_accuracy": theirs.accuracy,
    }
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cosines_and_uniqueness(seed: int):
    learned, true, *_ = sample(seed)
    figures = direction_statistics(learned, true)
    cosines = cosine_similarities(learned, true).abs()
    assert figures["uniqueness"].item() == pytest.approx(feature_uniqueness(learned, true))
    assert figures["mmcs_learned"].item() == pytest.approx(cosines.amax(1).mean().item())
    assert figures["mmcs_true"].item() == pytest.approx(cosines.amax(0).mean().item())
