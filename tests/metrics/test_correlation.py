import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.metrics import Correlation


def correlation(x: Tensor, y: Tensor) -> Tensor:
    metric = Correlation()
    metric.update(x, y)
    return metric.compute()


@given(tokens=st.integers(2, 50), mean=st.floats(-1e4, 1e4), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_equals_the_sum_over_centred_values(tokens, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(40, (tokens,), generator=generator)
    y = 0.1 * x + torch.randn(tokens, generator=generator) + mean
    dx, dy = x.double() - x.double().mean(), y.double() - y.double().mean()
    expected = (dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt()
    torch.testing.assert_close(
        correlation(x, y), expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_linear_functions_correlate_fully():
    x = torch.arange(1000)
    assert correlation(x, 3 * x + 7) == 1
    assert correlation(x, 5 - x) == -1


@pytest.mark.parametrize("constant", [0.0, 16.0, 0.1, 1e6 / 3])
def test_what_does_not_vary_has_no_correlation(constant):
    metric = Correlation()
    for seed in range(5):
        y = torch.randn(1001, generator=torch.Generator().manual_seed(seed))
        metric.update(torch.full((1001,), constant), y)
    assert metric.compute().isnan()


def test_a_small_spread_over_a_large_mean_is_found():
    x = torch.full((100_000,), 1e4)
    x[:10] += 1
    assert correlation(x, (x > 1e4).float()) == pytest.approx(1, abs=1e-5)


def test_shapes_must_agree():
    metric = Correlation()
    with pytest.raises(ValueError, match=r"x of shape \(3,\) and y of shape \(3, 1\) differ"):
        metric.update(torch.ones(3), torch.ones(3, 1))
    assert (metric.moments == 0).all()
