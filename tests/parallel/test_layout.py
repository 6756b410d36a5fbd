"""Which of a mesh's two sides has other tokens, and which shares out the features."""

from typing import Any

import pytest
from torch.distributed.device_mesh import init_device_mesh

from lightning_sae.parallel import Layout
from tests.helpers.ddp import run_on_two

NAMES = ("data_parallel", "tensor_parallel")


def lay_out(process: int, sizes: tuple[int, int]) -> tuple[Any, ...]:
    layout = Layout.on_mesh(6, init_device_mesh("cpu", sizes, mesh_dim_names=NAMES))
    return layout.share.sizes, layout.share.here.start, layout.ranks.size, layout.ranks.index


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 2), [((3, 3), 0, 1, 0), ((3, 3), 3, 1, 0)]),
        ((2, 1), [((6,), 0, 2, 0), ((6,), 0, 2, 1)]),
    ],
)
def test_each_side_of_the_mesh_has_its_meaning(sizes: tuple[int, int], expected: list[Any]):
    assert run_on_two(lay_out, sizes) == expected


def test_on_one_device_all_features_are_here():
    layout = Layout.on_one_device(6)
    assert layout.share.sizes == (6,)
    assert layout.ranks.size == 1
