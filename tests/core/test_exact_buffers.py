"""State that keeps its 32 bits."""

import pytest
import torch

from lightning_sae.core.exact_buffers import ExactBuffers


class Counting(ExactBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.tensor(1 / 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("coarse", torch.ones(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_its_float32_buffers_stay_what_they_are(dtype):
    outer = torch.nn.Sequential(Counting()).to(dtype)
    inner = outer[0]
    assert inner.weight.dtype == inner.coarse.dtype == dtype
    assert torch.equal(inner.mean, torch.tensor(1 / 3))
    assert inner.count.dtype == torch.int64


def test_they_move_with_the_module():
    moved = Counting().to("meta", torch.float16)
    assert moved.mean.device.type == moved.weight.device.type == "meta"
    assert moved.mean.dtype == torch.float32
