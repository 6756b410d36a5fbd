import pytest
import torch
import torch.distributed as dist

from tests.helpers.ddp import run_on_two


def rank_and_total(rank: int, values: list[float]) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor(values[rank])
    dist.all_reduce(total)
    return rank, dist.get_rank(), total


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("only rank 1")
    dist.barrier()


def test_each_rank_runs_in_its_own_process_and_they_talk():
    for _ in range(3):
        assert run_on_two(rank_and_total, [1.5, 2.0]) == [(0, 0, 3.5), (1, 1, 3.5)]


def test_an_error_on_one_rank_is_raised_and_the_next_call_works():
    with pytest.raises(KeyError, match="only rank 1"):
        run_on_two(fail_on_one)
    assert run_on_two(rank_and_total, [1.0, 0.0])[1] == (1, 1, 1.0)
