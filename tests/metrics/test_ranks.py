"""The metrics on several ranks equal the metrics on one that saw everything."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from benchmarks.metric_sync import FEATURES, peaks
from lightning_sae.metrics import DeadFeatures, FeatureDensity
from tests.helpers.ddp import run_on, run_on_two
from tests.metrics.samples import all_metrics, sample, split, values

Batches = list[dict[str, Tensor]]


def values_of_rank(rank: int, batches: list[Batches]) -> dict[str, Tensor]:
    return values(batches[rank])


def collection_of_rank(rank: int, batches: list[Batches]) -> list[dict[str, Tensor]]:
    """Values, and local counts after the sync, with all shared that a collection shares."""
    collection = MetricCollection(all_metrics())
    results = []
    for batch in batches[rank]:
        collection.update(**batch)
        synced = {name: value.clone() for name, value in collection.compute().items()}
        metrics = collection.items(copy_state=False)
        counting = {name: each for name, each in metrics if name != "correlation"}
        results.append(
            synced | {f"tokens of {name}": each.tokens for name, each in counting.items()}
        )
    return results


def states_around_a_sync(rank: int) -> tuple[list[int], list[int], list[int]]:
    """Local, synced and again local counts of a rank that may not gather."""
    gather, dist.all_gather = dist.all_gather, None
    try:
        density = FeatureDensity(2)
        density.update(torch.tensor([[1.0, rank]]))
        shared = density.fires  # with another metric of a collection
        density.sync()
        synced = density.fires.tolist()
        density.unsync()
        return shared.tolist(), synced, density.fires.tolist()
    finally:
        dist.all_gather = gather


def values_with_options(rank: int) -> dict[str, list[float]]:
    """Densities of two features on a rank where the first always fires, the other on rank 1."""
    codes = torch.tensor([[1.0, rank]])
    alone = [dist.new_group([each]) for each in range(dist.get_world_size())][rank]
    gathered = []

    def gather(tensor: Tensor, group: object = None) -> list[Tensor]:
        gathered.append(group)
        return [tensor, torch.ones_like(tensor)]

    options = {
        "default": {},
        "sync_on_compute": {"sync_on_compute": False},
        "process_group": {"process_group": alone},
        "distributed_available_fn": {"distributed_available_fn": lambda: False},
        "dist_sync_fn": {"dist_sync_fn": gather, "process_group": alone},
        "compute_on_cpu": {"compute_on_cpu": True},
    }
    metrics = {name: FeatureDensity(2, **each) for name, each in options.items()}
    for metric in metrics.values():
        metric.update(codes)
    found = {name: metric.compute().tolist() for name, metric in metrics.items()}
    assert gathered == [alone, alone]
    metric = metrics["default"]
    metric.sync(process_group=alone)
    found["sync(process_group)"] = metric.fires.tolist()
    metric.unsync()
    each_step, at_the_end = FeatureDensity(2, dist_sync_on_step=True), FeatureDensity(2)
    found["dist_sync_on_step"] = each_step(codes).tolist()
    found["dist_sync_on_step, accumulated"] = each_step.fires.tolist()
    found["forward"] = at_the_end(codes).tolist()
    return found


def densities_of_pairs(rank: int) -> tuple[list[float], float]:
    """Densities and the share of dead features over ranks 0 and 1, or over ranks 2 and 3."""
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    kinds = {"density": FeatureDensity, "dead": DeadFeatures}
    collection = MetricCollection(
        {name: kind(4, process_group=pair) for name, kind in kinds.items()}
    )
    collection.update(codes=torch.eye(4)[rank])
    found = collection.compute()
    return found["density"].tolist(), found["dead"].item()


class WithAList(FeatureDensity):
    """A metric of somebody else whose states are not all totals."""

    def __init__(self) -> None:
        super().__init__(2)
        self.add_state("largest", [], dist_reduce_fx="cat")

    def update(self, codes: Tensor) -> None:
        super().update(codes)
        self.largest.append(codes.max())

    def compute(self) -> list[float]:
        return [*self.fires.tolist(), *self.largest.tolist()]


def value_with_a_list(rank: int) -> list[float]:
    metric = WithAList()
    metric.update(torch.tensor([[1.0, 2.0 * rank]]))
    return metric.compute()


def close(value: Tensor, expected: Tensor, name: str) -> None:
    rtol = 1e-6 if name in ("fvu", "correlation") else 0
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("ranks", [2, 4])
@given(
    plan=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=7),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_division_over_ranks_equals_one_process(ranks, plan, seed):
    whole = sample(sum(tokens for tokens, _ in plan), seed)
    batches = split(whole, [tokens for tokens, _ in plan]) if plan else []
    per_rank = [
        [batch for batch, (_, owner) in zip(batches, plan, strict=True) if owner % ranks == rank]
        for rank in range(ranks)  # some get none
    ]
    expected = values([whole])
    for result in run_on(ranks, values_of_rank, per_rank):
        for name, value in result.items():
            close(value, expected[name], name)


def test_a_collection_can_be_computed_again_and_again():
    batches = split(sample(20), [4, 7, 1, 8])
    seen = [[batches[0], batches[2]], batches]
    tokens = [[4, 11], [1, 9]]
    for rank, results in enumerate(run_on_two(collection_of_rank, [batches[:2], batches[2:]])):
        for result, so_far, own in zip(results, seen, tokens[rank], strict=True):
            for name, expected in values(so_far).items():
                close(result[name], expected, name)
            counts = [count for name, count in result.items() if name.startswith("tokens of ")]
            assert counts == [own] * 5


def test_sync_adds_without_gathering_and_can_be_undone():
    first, second = run_on_two(states_around_a_sync)
    assert first == ([1, 0], [2, 1], [1, 0])
    assert second == ([1, 1], [2, 1], [1, 1])


def test_what_torchmetrics_lets_one_set_is_kept_to():
    together = {"default": [1, 0.5], "compute_on_cpu": [1, 0.5], "dist_sync_on_step": [1, 0.5]}
    for rank, found in enumerate(run_on_two(values_with_options)):
        alone = {
            name: [1.0, float(rank)]
            for name in (
                "sync_on_compute",
                "process_group",
                "distributed_available_fn",
                "sync(process_group)",
                "dist_sync_on_step, accumulated",
                "forward",
            )
        }
        gathered = {"dist_sync_fn": [1, (rank + 1) / 2]}  # with a token on which both fire
        assert found == together | alone | gathered


def test_a_process_group_adds_up_by_itself():
    for rank, (density, dead) in enumerate(run_on(4, densities_of_pairs)):
        assert density == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]][rank // 2]
        assert dead == 0.5


def test_a_metric_with_more_than_totals_is_gathered():
    for found in run_on_two(value_with_a_list):
        assert found == [2, 1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sixteen_million_features_are_added_up_in_little_memory(ranks: int):
    for found in run_on(ranks, peaks, FEATURES):
        for name, times in found.items():
            assert times < (2.2 if name.endswith("sync") else 3.1), name
