"""What is logged of a batch against what is obvious, on one rank and on two."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae import StandardSAE
from lightning_sae.core.batch_statistics import batch_statistics
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from tests.helpers.ddp import run_on_two
from tests.helpers.matches import matches_where
from tests.helpers.superposition import superposition

TOKENS = 96


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scaled activations of a large mean, and what is left of them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(TOKENS, 7, generator=generator) * torch.linspace(0, 2, TOKENS)[:, None] - 1
    scaled = torch.randn(TOKENS, 5, generator=generator) * torch.linspace(1, 3, TOKENS)[:, None]
    return codes, scaled + 40, scaled / 3


def of_rows(rows: slice, ranks: Ranks | None) -> dict[str, Tensor]:
    codes, scaled, error = (each[rows] for each in batch())
    matches = matches_where(codes, codes > 0)
    terms = {"loss": error.abs().mean(), "sparsity": codes.relu().sum(1).mean()}
    return batch_statistics(terms, matches, scaled, error, ranks)


def of_rank(rank: int, first: int) -> dict[str, Tensor]:
    return of_rows(slice(0, first) if rank == 0 else slice(first, TOKENS), Ranks())


def test_figures_of_one_rank_are_the_obvious_ones():
    codes, scaled, error = batch()
    counts = (codes > 0).sum(1).double()
    found = of_rows(slice(None), None)
    assert found["loss"] == error.abs().mean()
    torch.testing.assert_close(found["l0"].double(), counts.mean())
    torch.testing.assert_close(found["l0_std"].double(), counts.std(correction=0))
    variance = (scaled.double() - scaled.double().mean(0)).square().sum()
    torch.testing.assert_close(found["fvu"].double(), error.double().square().sum() / variance)


@pytest.mark.parametrize("first", [48, 80, 1, 0], ids=lambda first: f"{first} tokens on rank 0")
def test_two_ranks_log_what_one_would(first: int):
    expected = of_rows(slice(None), None)
    for found in run_on_two(of_rank, first):
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0, msg=name)


def test_activations_that_do_not_vary_have_no_variance_to_explain():
    matches = Matches(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)), shape=(1, 7))
    found = batch_statistics({}, matches, torch.ones(1, 5), torch.ones(1, 5))
    assert found["fvu"].isnan()
    assert found["l0"] == 0


def count_messages(rank: int) -> int:
    sae, sent = StandardSAE(8, 24), 0
    sae.loss(superposition(64, 8, n_features=16, seed=rank))
    reduce = torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal sent
        sent += 1
        reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", counted)
        sae.loss(superposition(64, 8, n_features=16, seed=rank))
    return sent


def test_all_figures_travel_together():
    assert run_on_two(count_messages) == [2, 2]  # the other one is the firing history's
