"""The Triton kernels against torch: in Triton's interpreter, or on a GPU where there is one.

Numbers are small integers where results must be equal: any order of adding them up is exact.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sae.sparse import kernels, on_gpu, rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 16, 127, 128, 129]  # a tile has 128 columns
BAGS = [0, 1, 2, 16, 17, 512, 513, 1100]  # a tile has 16 entries, a piece of a bag 512


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape, device=DEVICE).to(dtype)


def indices(count: int, below: int) -> Tensor:
    return torch.randint(below, (count,), device=DEVICE)


def bags_of(sizes: list[int]) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=int)).to(DEVICE)


def summed_slowly(table: Tensor, bag: Tensor, row: Tensor, weight: Tensor, bags: int) -> Tensor:
    gathered = table.double()[row] * weight.double()[:, None]
    return gathered.new_zeros(bags, table.shape[1]).index_add(0, bag, gathered)


def pairs_slowly(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    affinities = x.float() @ weight.float().T + bias.float()
    token, feature = torch.nonzero(affinities > bounds, as_tuple=True)
    return token, feature, affinities[token, feature]


class TestSumRows:
    @settings(max_examples=25, deadline=None)
    @given(
        sizes=st.lists(st.sampled_from(BAGS), max_size=4),
        width=st.sampled_from(WIDTHS),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 99),
    )
    def test_equals_torch(self, sizes: list[int], width: int, dtype: torch.dtype, seed: int):
        torch.manual_seed(seed)
        bag, table = bags_of(sizes), integers(4, width, dtype=dtype)
        row, weight = indices(len(bag), 4), integers(len(bag), dtype=dtype)
        result = kernels.sum_rows(table, bag, row, weight, len(sizes))
        expected = summed_slowly(table, bag, row, weight, len(sizes))
        assert result.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(result.double(), expected)
        else:  # rounded once
            torch.testing.assert_close(result, expected.to(dtype))

    @pytest.mark.parametrize("sizes", [[], [0, 0], [3, 0, 5], [600, 1]])
    def test_gradient_equals_torch(self, sizes: list[int]):
        torch.manual_seed(0)
        bag, table = bags_of(sizes), integers(4, 130)
        row, weight = indices(len(bag), 4), integers(len(bag)).requires_grad_()
        upstream = integers(len(sizes), 130)
        sums = [
            function(table, bag, row, weight, len(sizes))
            for function in (kernels.sum_rows, rows.sum_rows)
        ]
        assert torch.equal(*sums)
        assert torch.equal(*(torch.autograd.grad(out, weight, upstream)[0] for out in sums))

    def test_real_numbers(self):
        torch.manual_seed(0)
        sizes = [1400, 0, 3, 513]
        bag, table = bags_of(sizes), torch.randn(50, 70, device=DEVICE)
        row, weight = indices(len(bag), 50), torch.randn(len(bag), device=DEVICE)
        result = kernels.sum_rows(table, bag, row, weight, len(sizes))
        expected = summed_slowly(table, bag, row, weight, len(sizes))
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)

    def test_tensors_that_are_not_contiguous(self):
        table = torch.arange(15.0, device=DEVICE).view(3, 5).T
        weight = torch.full((1,), 2.0, device=DEVICE).expand(4)
        bag, row = bags_of([1, 3]), torch.tensor([4, 1, 0, 2], device=DEVICE)
        weight.requires_grad_()
        result = kernels.sum_rows(table, bag, row, weight, 2)
        assert torch.equal(result, rows.sum_rows(table, bag, row, weight, 2))
        result.sum().backward()  # its gradient is expanded
        assert torch.equal(weight.grad, table.sum(1)[row])


@settings(max_examples=30, deadline=None)
@given(
    entries=st.sampled_from([0, 1, 15, 16, 17, 100]),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_dot_rows_equals_torch(entries: int, width: int, dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    left, right = integers(4, width, dtype=dtype), integers(6, width, dtype=dtype)
    left_row, right_row = indices(entries, 4), indices(entries, 6)
    result = kernels.dot_rows(left, left_row, right, right_row)
    expected = (left.double()[left_row] * right.double()[right_row]).sum(1)
    assert result.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(result.double(), expected)
    else:
        torch.testing.assert_close(result, expected.to(dtype))


class TestPairsAbove:
    # The interpreter multiplies the bits of bfloat16 matrices, as integers.
    @settings(max_examples=40, deadline=None)
    @given(
        tokens=st.sampled_from([0, 1, 2, 127, 128, 130]),
        features=st.sampled_from([0, 1, 3, 64, 65, 128, 129, 300]),  # with 300, room may run out
        width=st.sampled_from([1, 5, 32, 33, 64, 70]),
        dtype=st.sampled_from(DTYPES if GPU else [torch.float32, torch.float16]),
        bound=st.sampled_from([None, -torch.inf, 0.0, 6.0, torch.inf]),
        seed=st.integers(0, 99),
    )
    def test_equals_torch(
        self,
        tokens: int,
        features: int,
        width: int,
        dtype: torch.dtype,
        bound: float | None,
        seed: int,
    ):
        torch.manual_seed(seed)
        x, weight = integers(tokens, width, dtype=dtype), integers(features, width, dtype=dtype)
        bias = integers(features, dtype=dtype)
        # Each feature has its own bound, or all have one; many affinities lie right on it.
        bounds = integers(features) if bound is None else torch.full_like(bias, bound).float()
        for one, other in zip(
            kernels.pairs_above(x, weight, bias, bounds),
            pairs_slowly(x, weight, bias, bounds),
            strict=True,
        ):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)

    def test_real_numbers(self):
        torch.manual_seed(0)
        x, weight = torch.randn(70, 50, device=DEVICE), torch.randn(90, 50, device=DEVICE)
        bias = torch.randn(90, device=DEVICE)
        largest = (x @ weight.T + bias).sort(0).values
        bounds = (largest[60] + largest[61]) / 2  # rounding does not cross the middle of a gap
        token, feature, affinity = kernels.pairs_above(x, weight, bias, bounds)
        expected = pairs_slowly(x, weight, bias, bounds)
        assert torch.equal(token, expected[0])
        assert torch.equal(feature, expected[1])
        torch.testing.assert_close(affinity, expected[2], rtol=1e-6, atol=1e-5)  # TF32 would not be

    def test_not_a_number_is_not_above(self):
        x = torch.tensor([[torch.nan], [1.0]], device=DEVICE)
        ones = torch.ones(1, device=DEVICE)
        token, _, affinity = kernels.pairs_above(x, ones[:, None], ones, -torch.inf * ones)
        assert token.tolist() == [1]
        assert affinity.tolist() == [2.0]


class TestWithKernel:
    @pytest.mark.parametrize("triton", [True, False])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_kernels_serve_what_they_can(
        self, device: str, dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch
    ):
        @on_gpu.with_kernel
        def sum_rows(table: Tensor, bags: int) -> str:
            return f"torch, {bags} bags"

        monkeypatch.setattr(kernels, "sum_rows", lambda table, bags: f"kernel, {bags} bags")
        monkeypatch.setattr(on_gpu, "_has_triton", lambda: triton)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        with FakeTensorMode():  # needs no GPU
            table = torch.empty(2, 3, dtype=dtype, device=device)
        kernel = device == "cuda" and dtype in DTYPES and triton
        assert sum_rows(table, 5) == f"{'kernel' if kernel else 'torch'}, 5 bags"

    def test_the_package_needs_no_triton(self):
        program = (
            "import sys; sys.modules['triton'] = None\n"
            "from lightning_sae.sparse.on_gpu import _has_triton\n"
            "assert not _has_triton()\n"
            "assert 'lightning_sae.sparse.kernels' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603 - ours


def test_kernels_compile(tmp_path: Path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, script], env=environment, check=True)  # noqa: S603 - ours
