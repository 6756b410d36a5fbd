"""Optimizers and schedules as users name them."""

import math

import pytest
import torch
from torch import nn

from lightning_sae.checks import UsageError
from lightning_sae.optim.chunked_adam import ChunkedAdam
from lightning_sae.optim.factories import in_terms_of, optimizer_and_schedule


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)


def test_by_default_the_rate_rises_and_falls_to_zero_and_never_below(optimizer):
    configured = optimizer_and_schedule(optimizer, None, steps=40)
    assert configured["optimizer"] is optimizer
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(42):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        configured["lr_scheduler"]["scheduler"].step()
    falls = [1 - step / 38 for step in range(38)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, *falls[1:], 0.0, 0.0])


def test_in_a_run_of_no_set_length_the_rate_stays(optimizer):
    assert optimizer_and_schedule(optimizer, None, math.inf) is optimizer


def test_a_schedule_that_torch_refuses_names_the_setting(optimizer):
    def schedule(of: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(of, factor=-1)

    with pytest.raises(UsageError, match=r"^lr_scheduler: Constant multiplicative factor"):
        optimizer_and_schedule(optimizer, schedule, steps=4)


@pytest.mark.parametrize("made", [torch.optim.Adam, torch.optim.NAdam, ChunkedAdam])
def test_an_eps_that_is_0_in_the_type_of_the_weights_is_refused(made):
    def configured(dtype: torch.dtype, **settings: float) -> object:
        layer = nn.Linear(2, 2, dtype=dtype)
        return optimizer_and_schedule(made(layer.parameters(), **settings), None, math.inf)

    message = rf"^optimizer: {made.__name__}'s eps=1e-08 is 0 in float16, .* 1e-4, .* bf16-mixed$"
    with pytest.raises(UsageError, match=message):
        configured(torch.float16)
    configured(torch.float16, eps=1e-4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        configured(dtype)


def test_optimizers_without_an_eps_or_with_several_are_taken():
    layer = nn.Linear(2, 2, dtype=torch.float16)
    for made in (torch.optim.SGD, torch.optim.Adafactor):
        optimizer_and_schedule(made(layer.parameters()), None, math.inf)


@pytest.mark.parametrize("error", [UsageError("told already"), KeyError("a bug")])
def test_other_errors_pass_as_they_are(error: Exception):
    with pytest.raises(type(error)) as caught, in_terms_of("optimizer", ValueError):
        raise error
    assert caught.value is error
