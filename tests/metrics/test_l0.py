import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.metrics import L0, L0StandardDeviation
from tests.metrics.samples import sample


def counts_one_by_one(codes: torch.Tensor) -> torch.Tensor:
    rows = codes.reshape(-1, codes.shape[-1]).tolist()
    return torch.tensor([sum(code > 0 for code in row) for row in rows], dtype=torch.float64)


@given(tokens=st.integers(1, 30), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_mean_and_spread_equal_the_obvious_ones(tokens, seed):
    codes = sample(tokens, seed)["codes"]
    counts = counts_one_by_one(codes)
    l0, l0_std = L0(), L0StandardDeviation()
    l0.update(codes)
    l0_std.update(codes)
    torch.testing.assert_close(l0.compute(), counts.mean().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(l0_std.compute(), counts.std(correction=0).float())


@pytest.mark.parametrize("shape", [(7,), (6, 7), (2, 3, 7), (1, 2, 3, 7)])
def test_any_leading_shape(shape):
    codes = torch.zeros(shape)
    codes[..., :2] = 1
    l0 = L0()
    l0.update(codes)
    assert l0.compute() == 2
    assert l0.tokens == codes.numel() // 7


def test_only_codes_above_zero_are_matches():
    l0 = L0()
    l0.update(torch.tensor([[-1.0, -0.0, 0.0, 1e-30]]))
    assert l0.compute() == 1


@pytest.mark.parametrize(
    "more", [0, 1]
)  # with one match more, rounding makes the variance negative
def test_no_spread_to_speak_of_however_many_tokens(more):
    tokens, l0 = 10**9, 10**4
    l0_std = L0StandardDeviation()
    l0_std.update(torch.ones(0, l0))
    l0_std.merge_state(
        {
            "matches": torch.tensor(tokens * l0 + more),
            "squared_matches": torch.tensor(tokens * l0**2 + more * (2 * l0 + 1)),
            "tokens": torch.tensor(tokens),
        }
    )
    assert l0_std.compute() == 0


def test_a_small_spread_over_a_large_mean_is_found():
    codes = torch.ones(1000, 10_000)
    codes[0, 0] = 0  # one token has one match less
    l0_std = L0StandardDeviation()
    l0_std.update(codes)
    torch.testing.assert_close(
        l0_std.compute(), torch.tensor((0.001 * 0.999) ** 0.5), rtol=1e-4, atol=0
    )
