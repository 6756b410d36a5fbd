"""Widths of numbers, neighbours of numbers, and shares at full width."""

import math

import pytest
import torch

from lightning_sae import numerics
from lightning_sae.numerics import just_above, just_below, ratio, typed_as, wide, widest_float


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ],
)
def test_wide_is_32_bits_at_least(dtype: torch.dtype, expected: torch.dtype):
    assert wide(torch.ones(2, dtype=dtype)).dtype == expected


def test_what_is_wide_enough_is_not_copied():
    x = torch.ones(2)
    assert wide(x) is x


def test_results_have_the_type_of_what_they_are_results_of():
    result = torch.ones(2)
    assert typed_as(result, torch.ones(2, dtype=torch.float16)).dtype == torch.float16
    assert typed_as(result, torch.ones(2, dtype=torch.int64)) is result


def test_the_widest_float_is_that_of_the_device():
    assert widest_float(torch.device("cpu")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("number", [0.0, 1.0, -1.0, 1e-40, 3e38])
def test_neighbours_turn_at_least_into_above(number: float):
    bound = torch.tensor([number])
    assert just_below(bound) < bound < just_above(bound)
    assert torch.equal(just_below(just_above(bound)), bound)


def test_shares_are_divided_at_full_width_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numerics, "_PIECE", 3)
    part = torch.arange(8).view(2, 4) + 2**40
    shares = ratio(part, torch.tensor(2**41))
    assert shares.dtype == torch.float32
    assert torch.equal(shares, (part.double() / 2**41).float())
    assert math.isnan(ratio(torch.tensor([0]), torch.tensor(0)))
