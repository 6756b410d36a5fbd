"""State that keeps its 32 bits."""

import pytest
import torch

from lightning_sae.core.exact_buffers import ExactBuffers


class Counting(ExactBuffers):
    exact_parameters = ("threshold",)

    def __init__(self) -> None:
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(1 / 3))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_it_names_are_never_narrower(dtype):
    outer = torch.nn.Sequential(Counting()).to(dtype)
    threshold = outer[0].threshold
    assert threshold.dtype == torch.promote_types(dtype, torch.float32)
    assert threshold.requires_grad
    assert threshold.float() == torch.tensor(1 / 3)


def test_they_move_with_the_module():
    moved = Counting().to("meta", torch.float16)
    devices = {each.device.type for each in (moved.mean, moved.weight, moved.threshold)}
    assert devices == {"meta"}
    assert moved.mean.dtype == torch.float32
