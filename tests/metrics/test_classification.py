import pytest
import torch
from torch.nn import functional

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureClassification
from tests.helpers.ddp import run_on_two
from tests.helpers.matches import matches_where

TRUE, LEARNED, D_MODEL = 9, 12, 6


def sample(tokens: int, seed: int = 0):
    """Return directions that were learned and that are true, and codes of both."""
    draw = torch.Generator().manual_seed(seed)
    learned, true = (torch.randn(n, D_MODEL, generator=draw) for n in (LEARNED, TRUE))
    codes, truth = (torch.rand(tokens, n, generator=draw) - 0.6 for n in (LEARNED, TRUE))
    codes[:, 0] = -1  # a dead feature
    truth[:, 2] = -1
    return learned, true, codes.relu(), truth.relu()


def by_hand(learned, true, codes, truth) -> dict[str, float]:
    """The definition, a feature at a time."""
    nearest = functional.cosine_similarity(learned.unsqueeze(1), true, dim=2).abs().argmax(1)
    rows = []
    for feature, target in enumerate(nearest.tolist()):
        fires, there = codes[:, feature] > 0, truth[:, target] > 0
        hits = int((fires & there).sum())
        precision = hits / int(fires.sum()) if fires.any() else 0.0
        recall = hits / int(there.sum()) if there.any() else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        rows.append([precision, recall, f1, (fires == there).double().mean().item()])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    names = ("feature_precision", "feature_recall", "feature_f1", "feature_accuracy")
    return dict(zip(names, means, strict=True))


def matches(codes) -> Matches:
    return matches_where(codes, codes > 0)


@pytest.mark.parametrize("sizes", [[40], [7, 0, 30, 3]])
def test_figures_are_those_of_the_definition(sizes):
    learned, true, codes, truth = sample(40)
    metric = FeatureClassification(learned, true)
    for part, true_part in zip(codes.split(sizes), truth.split(sizes), strict=True):
        metric.update(matches(part), matches(true_part))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(by_hand(learned, true, codes, truth))


def test_a_match_without_a_value_is_no_firing():
    learned, true, codes, truth = sample(30)
    everything = matches_where(codes, codes >= 0), matches_where(truth, truth >= 0)
    metric, other = FeatureClassification(learned, true), FeatureClassification(learned, true)
    metric.update(*everything)
    other.update(matches(codes), matches(truth))
    assert metric.compute() == other.compute()


def test_the_truth_classifies_itself():
    _, true, _, truth = sample(50)
    metric = FeatureClassification(true, true)
    truth[0, 2] = 1
    metric.update(matches(truth), matches(truth))
    assert {value.item() for value in metric.compute().values()} == {1.0}


def test_before_the_first_token_there_is_nothing_to_say():
    learned, true, codes, truth = sample(0)
    metric = FeatureClassification(learned, true)
    metric.update(matches(codes), matches(truth))
    assert all(value.isnan() for value in metric.compute().values())


def test_codes_of_other_shapes_are_refused():
    learned, true, codes, truth = sample(5)
    metric = FeatureClassification(learned, true)
    with pytest.raises(UsageError, match=r"must be \(tokens, 12\) and \(tokens, 9\)"):
        metric.update(matches(truth), matches(codes))
    with pytest.raises(UsageError, match=r"shape \(5, 12\) and true ones of shape \(4, 9\)"):
        metric.update(matches(codes), matches(truth[:4]))


def figures_of_rank(rank: int) -> dict[str, float]:
    learned, true, codes, truth = sample(40)
    part = [slice(0, 11), slice(11, None)][rank]
    metric = FeatureClassification(learned, true)
    metric.update(matches(codes[part]), matches(truth[part]))
    return {name: value.item() for name, value in metric.compute().items()}


def test_two_ranks_count_what_one_does():
    expected = by_hand(*sample(40))
    for found in run_on_two(figures_of_rank):
        assert found == pytest.approx(expected)
