"""The metrics on several ranks equal the metrics on one that saw everything."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from benchmarks.metric_sync import FEATURES, peaks
from lightning_sae.metrics import FeatureDensity
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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sixteen_million_features_are_added_up_in_little_memory(ranks: int):
    for found in run_on(ranks, peaks, FEATURES):
        for name, times in found.items():
            assert times < (2.2 if name.endswith("sync") else 3.1), name
