"""What ranks choose together against a brute force on all their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import feature_choice, midpoint_thresholds, mutual_choice, over_ranks
from lightning_sae.allocation.over_ranks import (
    feature_choice_over_ranks,
    midpoint_thresholds_over_ranks,
    mutual_choice_over_ranks,
)
from tests.allocation.test_choices import affinities, brute_force
from tests.helpers.ddp import run_on


def choose(
    rank: int, parts: list[Tensor], budget: int, budgets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mine = parts[rank]
    by_feature = feature_choice_over_ranks(mine, budgets)
    thresholds = midpoint_thresholds_over_ranks(mine, budgets)
    return by_feature.to_dense(), mutual_choice_over_ranks(mine, budget).to_dense(), thresholds


def check(ranks: int, scores: Tensor, data: st.DataObject) -> None:
    tokens, features = scores.shape
    ends = data.draw(st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1))
    parts = list(scores.tensor_split(sorted(ends)))  # uneven, and some ranks may have none
    budget = data.draw(st.integers(0, tokens * features))
    budgets = data.draw(st.lists(st.integers(0, tokens), min_size=features, max_size=features))
    by_batch = brute_force(scores, [[0] * features] * tokens, [budget])
    by_feature = brute_force(scores, [list(range(features))] * tokens, budgets)
    midpoints = midpoint_thresholds(scores, feature_choice(scores, torch.tensor(budgets)))

    results = run_on(ranks, choose, parts, budget, torch.tensor(budgets))
    assert torch.equal(torch.cat([each[0] for each in results]), by_feature)
    assert torch.equal(torch.cat([each[1] for each in results]), by_batch)
    for _, _, thresholds in results:
        assert torch.equal(thresholds, midpoints)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(affinities(), st.data())
def test_two_ranks_choose_as_one_would(scores: Tensor, data: st.DataObject):
    check(2, scores, data)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(affinities(), st.data())
def test_four_ranks_choose_as_one_would(scores: Tensor, data: st.DataObject):
    check(4, scores, data)


def choose_and_count(
    rank: int, parts: list[Tensor], budget: int, budgets: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """Choose, and count the candidates that the rank sends at a time."""
    gather, sent = over_ranks.gather_over_ranks, []

    def counting(rows: Tensor) -> list[Tensor]:
        sent.append(len(rows))
        return gather(rows)

    over_ranks.gather_over_ranks = counting
    try:
        by_feature, by_batch, _ = choose(rank, parts, budget, budgets)
    finally:
        over_ranks.gather_over_ranks = gather
    return by_batch, by_feature, sent


@pytest.mark.parametrize("alike", [True, False])
def test_large_batches_take_small_messages(alike: bool):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(512, 256, generator=generator, dtype=torch.float64)
    if not alike:
        scores[:256] *= 100
    budget, budgets = 32 * 512, torch.randint(0, 128, (256,), generator=generator)
    results = run_on(2, choose_and_count, list(scores.split(256)), budget, budgets)
    found = [torch.cat(each) for each in zip(*(result[:2] for result in results), strict=True)]
    assert torch.equal(found[0], mutual_choice(scores, budget).to_dense())
    assert torch.equal(found[1], feature_choice(scores, budgets).to_dense())
    for _, _, (*for_features, for_batch) in results:  # features choose, and set thresholds
        if alike:  # of 65,536 pairs on each rank
            assert for_batch < 2 * budget**0.5
            assert max(for_features) < 2 * (budgets + 1).sqrt().sum()
        else:
            assert for_batch <= budget
            assert max(for_features) <= (budgets + 1).sum()


IMPOSSIBLE = [
    (10, [1, 1, 1], "budgets from 10 to 10 are out of range: each is of 9 pairs on 2 ranks"),
    (-1, [1, 1, 1], "budgets from -1 to -1 are out of range: each is of 9 pairs on 2 ranks"),
    (9, [0, 4, 1], "budgets from 0 to 4 are out of range: each is of 3 pairs on 2 ranks"),
    (9, [1, 1], "budgets must be 3 integers, one a feature, not torch.int64 of shape (2,)"),
    (9, [1.0, 1.0, 1.0], "budgets must be 3 integers, one a feature, not torch.float32 of shape"),
]


def messages_of_rank(rank: int) -> list[str]:
    messages = []
    for budget, budgets, _ in IMPOSSIBLE:
        with pytest.raises(ValueError, match="budgets") as raised:
            choose(rank, [torch.ones(1, 3), torch.ones(2, 3)], budget, torch.tensor(budgets))
        messages.append(str(raised.value))
    return messages


def test_impossible_requests_are_explained_on_every_rank():
    for messages in run_on(2, messages_of_rank):
        for message, (_, _, expected) in zip(messages, IMPOSSIBLE, strict=True):
            assert message.startswith(expected)
