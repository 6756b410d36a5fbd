"""One threshold for all pairs of a batch."""

import pytest
import torch

from lightning_sae.allocation import common_threshold, threshold_choice
from lightning_sae.parallel import Ranks
from tests.helpers.ddp import run_on


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_as_many_are_at_or_above_it(budget: int):
    affinities = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    threshold = common_threshold(affinities, budget)
    assert (affinities >= threshold).sum() == budget
    assert len(threshold_choice(affinities, threshold)) == budget - 1


def test_it_is_zero_where_nothing_is_positive():
    assert common_threshold(-torch.ones(3, 4), 5) == 0
    assert common_threshold(torch.ones(3, 4), 0) == 0


def on_a_rank(process: int) -> torch.Tensor:
    affinities = torch.randn(31, 12, generator=torch.Generator().manual_seed(0))
    ranks = Ranks()
    return common_threshold(affinities.split([30, 1])[ranks.index], 50, ranks=ranks)


def test_ranks_find_that_of_all_together():
    affinities = torch.randn(31, 12, generator=torch.Generator().manual_seed(0))
    expected = common_threshold(affinities, 50)
    assert all(torch.equal(found, expected) for found in run_on(2, on_a_rank))
