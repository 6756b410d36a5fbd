"""What ranks tell each other, and that one rank needs nobody to tell."""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_sae.parallel import Ranks, ranks_of
from lightning_sae.parallel.ranks import processes
from tests.helpers.ddp import run_on, run_on_two


def talk(rank: int, ranks: Ranks) -> dict[str, Tensor | int | list[Tensor]]:
    own = torch.tensor([1.0, -1.0]) * (rank + 1)
    same = torch.tensor([float(rank)])
    ranks.broadcast(same)
    return {
        "size": ranks.size,
        "index": ranks.index,
        "sum": ranks.all_reduce(own),
        "min": ranks.all_reduce(own, "min"),
        "max": ranks.all_reduce(own, "max"),
        "mean": ranks.mean(own),
        "rows": ranks.all_gather(torch.arange(2 * rank + 1)),
        "count": ranks.count(range(rank + 3), own.device),
        "first's": same,
        "own": own,
    }


def test_alone_everything_is_what_it_was():
    said = talk(0, Ranks())
    own = said.pop("own")
    for kind in ("sum", "min", "max", "mean"):
        assert torch.equal(said.pop(kind), own)
        assert said.get(kind) is not own
    assert said == {
        "size": 1,
        "index": 0,
        "rows": [torch.tensor([0])],
        "count": 3,
        "first's": torch.tensor([0.0]),
    }
    assert Ranks().is_first_with_its_tokens


def test_two_ranks_hear_the_same():
    both = run_on_two(talk, Ranks())
    for index, said in enumerate(both):
        assert (said["size"], said["index"], said["count"]) == (2, index, 3 + 4)
        assert said["sum"].tolist() == [3.0, -3.0]
        assert said["min"].tolist() == [1.0, -2.0]
        assert said["max"].tolist() == [2.0, -1.0]
        assert said["mean"].tolist() == [1.5, -1.5]
        assert [rows.tolist() for rows in said["rows"]] == [[0], [0, 1, 2]]
        assert said["first's"] == 0
        assert said["own"].tolist() == [index + 1.0, -index - 1.0]  # not changed in place


def in_groups(process: int) -> tuple[int, int, bool, float, tuple[int, int]]:
    """Two groups of two that share out features: processes 0 and 2 have different tokens."""
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    ranks = ranks_of(SimpleNamespace(strategy=SimpleNamespace(device_mesh=mesh)))
    total = ranks.all_reduce(torch.tensor(10.0**process)).item()
    return ranks.size, ranks.index, ranks.is_first_with_its_tokens, total, processes()


def test_ranks_are_those_with_different_tokens():
    assert run_on(4, in_groups) == [
        (2, 0, True, 101.0, (0, 4)),
        (2, 0, False, 1010.0, (1, 4)),
        (2, 1, True, 101.0, (2, 4)),
        (2, 1, False, 1010.0, (3, 4)),
    ]


def test_without_a_mesh_they_are_all_processes():
    for trainer in (None, SimpleNamespace(strategy=SimpleNamespace())):
        assert ranks_of(trainer) == Ranks(None)
