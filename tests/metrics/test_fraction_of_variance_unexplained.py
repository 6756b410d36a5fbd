import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.metrics import FractionOfVarianceUnexplained
from tests.metrics.samples import D_MODEL, sample, split


def fvu_of(reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    metric = FractionOfVarianceUnexplained(x.shape[-1])
    metric.update(reconstruction, x)
    return metric.compute()


def two_pass_fvu(reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x, reconstruction = x.double(), reconstruction.double()
    return ((x - reconstruction) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@given(tokens=st.integers(2, 40), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_batches_give_what_two_passes_over_everything_give(tokens, seed):
    data = sample(tokens, seed)
    metric = FractionOfVarianceUnexplained(D_MODEL)
    for batch in split(data, [1, tokens - 2, 1]):
        metric.update(batch["reconstruction"], batch["activations"])
    expected = two_pass_fvu(data["reconstruction"], data["activations"])
    torch.testing.assert_close(metric.compute(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_a_large_mean_costs_no_precision_that_shows(offset):
    torch.manual_seed(0)
    metric, xs, reconstructions = FractionOfVarianceUnexplained(64), [], []
    for _ in range(50):
        xs.append(offset + torch.randn(40, 64))
        reconstructions.append(xs[-1] + 0.1 * torch.randn(40, 64))
        metric.update(reconstructions[-1], xs[-1])
    expected = two_pass_fvu(torch.cat(reconstructions), torch.cat(xs))
    torch.testing.assert_close(metric.compute(), expected.float(), rtol=1e-6, atol=0)


def test_perfect_is_zero_and_the_mean_is_one():
    x = 100 + torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert fvu_of(x, x) == 0
    torch.testing.assert_close(fvu_of(x.mean(0).expand_as(x), x), torch.tensor(1.0))


def test_the_mean_is_that_of_everything_not_of_the_batch():
    metric = FractionOfVarianceUnexplained(1)
    metric.update(torch.zeros(2, 1), torch.full((2, 1), 1.0))  # no variance within a batch
    metric.update(torch.zeros(2, 1), torch.full((2, 1), 3.0))
    assert metric.compute() == (2 * 1 + 2 * 9) / (4 * 1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3, -1e-4, 1e30])
@pytest.mark.parametrize("tokens", [1, 7, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_activations_have_no_variance_to_explain(value, tokens, dtype):
    x = torch.full((tokens, 3), value, dtype=dtype)  # not all sums of these are exact
    assert fvu_of(x, x).isnan()
    assert fvu_of(x + 1, x).isnan()


def test_bfloat16_inputs_are_widened_before_they_are_subtracted():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    reconstruction = (x * 1.01).bfloat16()
    expected = two_pass_fvu(reconstruction, x).float()
    torch.testing.assert_close(fvu_of(reconstruction, x), expected, rtol=1e-6, atol=0)


def test_any_leading_shape():
    data = sample(12)
    reconstruction, activations = data["reconstruction"], data["activations"]
    folded = fvu_of(reconstruction.view(2, 6, D_MODEL), activations.view(2, 6, D_MODEL))
    assert folded == fvu_of(reconstruction, activations)


@pytest.mark.parametrize(("left", "right"), [((4, 3), (5, 3)), ((4, 2), (4, 2)), ((3,), (1, 3))])
def test_other_shapes_are_refused(left, right):
    with pytest.raises(ValueError, match=r"both must be \(\.\.\., d_model=3\)"):
        FractionOfVarianceUnexplained(3).update(torch.zeros(left), torch.zeros(right))


def test_an_activation_has_dimensions():
    with pytest.raises(ValueError, match="d_model=0"):
        FractionOfVarianceUnexplained(0)
