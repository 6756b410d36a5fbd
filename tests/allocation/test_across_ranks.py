"""What ranks choose together against a brute force on all their tokens."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import (
    RankDiscount,
    feature_choice,
    feature_choice_counting,
    midpoint_thresholds,
    mutual_choice,
)
from lightning_sae.parallel import Ranks
from tests.allocation.brute_force import affinities, by_batch, by_feature, midpoints
from tests.helpers.ddp import run_on

Chosen = tuple[Tensor, Tensor, Tensor, Tensor]
DISCOUNT = RankDiscount(2)


def choose(
    rank: int, parts: list[Tensor], budget: int, budgets: Tensor, ranks: Ranks | None = None
) -> Chosen:
    ranks, mine = ranks or Ranks(), parts[rank]
    chosen_by_feature = feature_choice(mine, budgets, ranks=ranks).to_dense()
    thresholds = midpoint_thresholds(mine, budgets, ranks=ranks)
    by_all = mutual_choice(mine, budget, ranks=ranks).to_dense()
    by_worth = mutual_choice(mine, budget, discount=DISCOUNT, ranks=Ranks()).to_dense()
    return chosen_by_feature, by_all, thresholds, by_worth


def check(ranks: int, scores: Tensor, data: st.DataObject) -> None:
    tokens, features = scores.shape
    ends = data.draw(st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1))
    parts = list(scores.tensor_split(sorted(ends)))  # uneven, and some ranks may have none
    budget = data.draw(st.integers(0, tokens * features))
    budgets = data.draw(st.lists(st.integers(0, tokens), min_size=features, max_size=features))
    expected = midpoints(scores, feature_choice(scores, torch.tensor(budgets)))

    results = run_on(ranks, choose, parts, budget, torch.tensor(budgets))
    assert torch.equal(torch.cat([each[0] for each in results]), by_feature(scores, budgets))
    assert torch.equal(torch.cat([each[1] for each in results]), by_batch(scores, budget))
    expected_by_worth = mutual_choice(scores, budget, discount=DISCOUNT).to_dense()
    assert torch.equal(torch.cat([each[3] for each in results]), expected_by_worth)
    for _, _, thresholds, _ in results:
        assert torch.equal(thresholds, expected)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(affinities(), st.data())
def test_two_ranks_choose_as_one_would(scores: Tensor, data: st.DataObject):
    check(2, scores, data)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(affinities(), st.data())
def test_four_ranks_choose_as_one_would(scores: Tensor, data: st.DataObject):
    check(4, scores, data)


@dataclass(frozen=True)
class Counting(Ranks):
    """Ranks that note how many rows this one sends at a time."""

    sent: list[int] = field(default_factory=list)

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        self.sent.append(len(rows))
        return super().all_gather(rows)


def choose_and_count(
    rank: int, parts: list[Tensor], budget: int, budgets: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    ranks = Counting()
    chosen_by_feature, chosen_by_batch, *_ = choose(rank, parts, budget, budgets, ranks)
    return chosen_by_batch, chosen_by_feature, ranks.sent


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
        assert len(for_features) == 3
        if alike:  # of 65,536 pairs on each rank
            assert for_batch < 2 * budget**0.5
            assert max(for_features) < 2 * (budgets + 1).sqrt().sum()
        else:
            assert for_batch <= budget
            assert max(for_features) <= (budgets + 1).sum()


def choose_in_other_ways(rank: int, parts: list[Tensor]) -> list[Tensor]:
    mine, ranks = parts[rank], Ranks()
    budgets = torch.full((mine.shape[1],), 5)
    counted = feature_choice_counting(mine, budgets, torch.full_like(mine[0], 0.5), ranks=ranks)
    assert torch.equal(
        counted.matches.to_dense(), feature_choice(mine, budgets, ranks=ranks).to_dense()
    )
    guessed = [
        mutual_choice(mine, 40, guess, discount=discount, ranks=ranks).to_dense()
        for discount in (None, DISCOUNT)
        for guess in (0.1, 1.0, 9.0)
    ]
    return [counted.passing, feature_choice(mine, budgets).to_dense(), *guessed]


def test_ranks_count_their_own_tokens_and_choose_alone_unless_told():
    scores = torch.randn(24, 10, generator=torch.Generator().manual_seed(5))
    parts = list(scores.split([8, 16]))
    results = run_on(2, choose_in_other_ways, parts)
    for mine, (passing, alone, *_) in zip(parts, results, strict=True):
        assert torch.equal(passing, (mine > 0.5).sum(0))
        assert torch.equal(alone, by_feature(mine, [5] * 10))
    expected = [by_batch(scores, 40)] * 3
    expected += [mutual_choice(scores, 40, discount=DISCOUNT).to_dense()] * 3
    for i, guessed in enumerate(zip(*(each[2:] for each in results), strict=True)):
        assert torch.equal(torch.cat(guessed), expected[i])


IMPOSSIBLE = [
    (10, [1, 1, 1], "budget=10 is out of range: the batch has 9 pairs on 2 ranks"),
    (-1, [1, 1, 1], "budget=-1 is out of range: the batch has 9 pairs on 2 ranks"),
    (9, [0, 4, 1], "budgets from 0 to 4 are out of range: the batch has 3 tokens on 2 ranks"),
    (9, [1, 1], "budgets must be 3 integers, one a feature, not torch.int64 of shape (2,)"),
    (9, [1.0, 1.0, 1.0], "budgets must be 3 integers, one a feature, not torch.float32 of shape"),
]


def messages_of_rank(rank: int) -> list[str]:
    messages = []
    for budget, budgets, _ in IMPOSSIBLE:
        with pytest.raises(ValueError, match="budget") as raised:
            choose(rank, [torch.ones(1, 3), torch.ones(2, 3)], budget, torch.tensor(budgets))
        messages.append(str(raised.value))
    return messages


def test_impossible_requests_are_explained_on_every_rank():
    for messages in run_on(2, messages_of_rank):
        for message, (_, _, expected) in zip(messages, IMPOSSIBLE, strict=True):
            assert message.startswith(expected)
