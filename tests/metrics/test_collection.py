"""The metrics in a collection, among themselves and with those of somebody else."""

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from lightning_sae.matches import Matches
from lightning_sae.metrics import (
    L0,
    DeadFeatures,
    FeatureDensity,
    FractionOfVarianceUnexplained,
    TotalsMetric,
    ZipfStatistics,
)
from lightning_sae.metrics.collection import collect, figures, of_a_dictionary
from lightning_sae.numerics import ratio
from tests.metrics.samples import all_metrics, sample, split, values


def alike(tokens: int) -> dict[str, torch.Tensor]:
    """Tokens on which totals of different metrics agree: everything fires, all is 1 or 0."""
    return {
        "codes": torch.ones(tokens, 7),
        "activations": torch.zeros(tokens, 3),
        "x": torch.zeros(tokens, 3),
        "reconstruction": torch.ones(tokens, 3),
        "y": torch.ones(tokens, 3),
    }


@pytest.mark.parametrize("first", [sample(4, seed=1), alike(1), sample(0)])
def test_metric_collection_gives_what_each_metric_gives_alone(first):
    batches = [first, *split(sample(9), [4, 0, 5])]
    collection = MetricCollection(all_metrics())
    for batch in batches:
        collection.update(**batch)
    together, alone = collection.compute(), values(batches)
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])
    collection.reset()
    collection.update(**batches[1])
    for name, value in values(batches[1:2]).items():
        torch.testing.assert_close(collection.compute()[name], value)


def test_metric_collection_shares_only_updates_that_are_the_same():
    collection = MetricCollection(all_metrics())
    collection.update(**alike(1))
    groups = sorted(sorted(group) for group in collection.compute_groups.values())
    assert groups == [["correlation"], ["dead", "density"], ["fvu"], ["l0", "l0_std"]]


class MeanCode(TotalsMetric):
    """A metric of somebody else, which names what it takes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_total("value", dtype=torch.float64)
        self.add_total("matches")

    def update(self, codes):
        self.add_to_totals(value=codes.value.sum(), matches=len(codes))

    def compute(self):
        return ratio(self.value, self.matches)


class LargestActivation(Metric):
    """Another one, which needs more than totals."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("largest", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, activations):
        self.largest = self.largest.maximum(activations.max())

    def compute(self):
        return self.largest


def test_a_collection_gives_each_metric_what_it_names():
    collection = MetricCollection(
        {
            "fvu": FractionOfVarianceUnexplained(2),
            "l0": L0(),
            "feature_density": FeatureDensity(4),
            "dead_fraction": DeadFeatures(4),
            "zipf": ZipfStatistics(4),
            "mean_code": MeanCode(),
            "largest_activation": LargestActivation(),
        },
        prefix="val/",
    )
    token, feature = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2])
    activations = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    for value in (1.0, 3.0):
        collection.update(
            codes=Matches(token, feature, torch.full((3,), value), shape=(2, 4)),
            reconstruction=activations + 1,
            activations=activations,
        )
    found = collection.compute()
    assert found.pop("val/feature_density").tolist() == [0.5, 0, 1, 0]
    assert {name: value.item() for name, value in found.items()} == {
        "val/fvu": (4 * 2) / (4 * 4),
        "val/l0": 1.5,
        "val/dead_fraction": 0.5,
        "val/mean_code": 2,
        "val/largest_activation": 4,
    }  # four features have no law


class Rare(TotalsMetric):
    """Codes above a bound: rare events, of which a first batch may have none."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.add_total("hits")

    def update(self, codes: torch.Tensor | Matches) -> None:
        values = codes.value if isinstance(codes, Matches) else codes
        self.add_to_totals(hits=(values > self.bound).sum())

    def compute(self) -> float:
        return float(self.hits)


def test_metrics_that_look_alike_at_first_do_not_share_counts():
    collection = collect({"low": Rare(1.0), "high": Rare(2.0), "l0": L0(), "l0_std": L0()})
    for size in (0.5, 1.5):
        collection.update(codes=torch.full((3, 1), size))
    found = figures(collection)
    assert {name: value.item() for name, value in found.items()} == {
        "low": 3.0,
        "high": 0.0,
        "l0": 1.0,
        "l0_std": 1.0,
    }


def test_a_metric_in_the_place_of_another_has_counts_of_its_own():
    collection = collect(
        of_a_dictionary(d_model=2, n_features=4) | {"l0": Rare(1.0), "feature_density": Rare(3.0)}
    )
    codes = Matches(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2]), torch.ones(3), shape=(2, 4))
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for _ in range(2):
        collection.update(codes=codes, reconstruction=x, activations=x)
    found = figures(collection)
    names = ("l0", "feature_density", "l0_std", "dead_fraction", "tokens")
    assert [found[name].item() for name in names] == [0.0, 0.0, 0.5, 0.5, 4.0]


def test_numbers_have_the_names_of_metrics_or_their_own():
    collection = collect({"density": FeatureDensity(2), "zipf": Both(), "other": Both()})
    collection.update(codes=torch.ones(4, 2))
    assert figures(collection) == {"a": torch.tensor(1), "b": torch.tensor(2.0)}


class Both(TotalsMetric):
    def __init__(self) -> None:
        super().__init__()
        self.add_total("unused")

    def update(self, codes: torch.Tensor) -> None: ...

    def compute(self) -> dict[str, float | torch.Tensor]:
        return {"a": 1, "b": torch.tensor(2.0)}
