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

from lightning_sae.kernels import dispatch, dots, maxima, pairs, sums
from lightning_sae.sparse import rows

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


def scores_slowly(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    affinities = x.float() @ weight.float().T + bias.float()
    return affinities if scale is None else affinities * scale[:, None]


def pairs_slowly(scores: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    feature, token = torch.nonzero((scores > bounds).T, as_tuple=True)
    return token, feature, scores[token, feature]


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
        result = sums.sum_rows(table, bag, row, weight, len(sizes))
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
        results = [
            function(table, bag, row, weight, len(sizes))
            for function in (sums.sum_rows, rows.sum_rows)
        ]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(out, weight, upstream)[0] for out in results))

    def test_real_numbers(self):
        torch.manual_seed(0)
        sizes = [1400, 0, 3, 513]
        bag, table = bags_of(sizes), torch.randn(50, 70, device=DEVICE)
        row, weight = indices(len(bag), 50), torch.randn(len(bag), device=DEVICE)
        result = sums.sum_rows(table, bag, row, weight, len(sizes))
        expected = summed_slowly(table, bag, row, weight, len(sizes))
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)

    def test_tensors_that_are_not_contiguous(self):
        table = torch.arange(15.0, device=DEVICE).view(3, 5).T
        weight = torch.full((1,), 2.0, device=DEVICE).expand(4)
        bag, row = bags_of([1, 3]), torch.tensor([4, 1, 0, 2], device=DEVICE)
        weight.requires_grad_()
        result = sums.sum_rows(table, bag, row, weight, 2)
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
    result = dots.dot_rows(left, left_row, right, right_row)
    expected = (left.double()[left_row] * right.double()[right_row]).sum(1)
    assert result.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(result.double(), expected)
    else:
        torch.testing.assert_close(result, expected.to(dtype))


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Inputs, encoder, and what affinities of each token are multiplied by."""
    torch.manual_seed(draw(st.integers(0, 99)))
    tokens = draw(st.sampled_from([0, 1, 2, 127, 128, 130]))
    features = draw(
        st.sampled_from([0, 1, 3, 64, 65, 128, 129, 300])
    )  # 300: more than a buffer holds
    width = draw(st.sampled_from([1, 5, 32, 33, 64, 70]))
    # The interpreter multiplies the bits of bfloat16 matrices, as integers.
    dtype = draw(st.sampled_from(DTYPES if GPU else [torch.float32, torch.float16]))
    x, weight = integers(tokens, width, dtype=dtype), integers(features, width, dtype=dtype)
    scale = integers(tokens) if draw(st.booleans()) else None
    return x, weight, integers(features, dtype=dtype), scale


class TestPairsAbove:
    @settings(max_examples=40, deadline=None)
    @given(
        given=inputs(),
        bound=st.sampled_from([None, -torch.inf, 0.0, 6.0, torch.inf]),
        by_token=st.booleans(),
    )
    def test_equals_torch(self, given: Inputs, bound: float | None, by_token: bool):
        scores = scores_slowly(*given)
        # Each row has its own bound, or all have one; many scores lie right on it.
        bounds = integers(len(scores), 1) if by_token else integers(scores.shape[1])
        bounds = bounds if bound is None else torch.full_like(bounds, bound)
        for one, other in zip(
            pairs.pairs_above(*given, bounds), pairs_slowly(scores, bounds), strict=True
        ):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)

    @settings(max_examples=25, deadline=None)
    @given(given=inputs(), bound=st.sampled_from([0.0, 6.0, torch.inf]), room=st.floats(0.01, 1))
    def test_some_fill_the_room_there_is(self, given: Inputs, bound: float, room: float):
        scores = scores_slowly(*given)
        if not scores.numel():
            return
        capacity = max(1, int(room * scores.numel()))
        bounds = scores.new_full((scores.shape[1],), bound)
        count, found = pairs.some_pairs_above(*given, bounds, capacity)
        expected = pairs_slowly(scores, bounds)
        assert count == len(expected[0])
        assert all(len(column) == capacity for column in found)
        if count <= capacity:
            last = scores.shape[0] - 1, scores.shape[1] - 1, 0.0
            real = found[2] > 0  # the last pair may be real, and come among those that are not
            for column, values, filler in zip(found, expected, last, strict=True):
                assert torch.equal(column[real], values)
                assert (column[~real] == filler).all()

    def test_real_numbers(self):
        torch.manual_seed(0)
        x, weight = torch.randn(70, 50, device=DEVICE), torch.randn(90, 50, device=DEVICE)
        bias = torch.randn(90, device=DEVICE)
        scores = scores_slowly(x, weight, bias, None)
        largest = scores.sort(0).values
        bounds = (largest[60] + largest[61]) / 2  # rounding does not cross the middle of a gap
        token, feature, score = pairs.pairs_above(x, weight, bias, None, bounds)
        expected = pairs_slowly(scores, bounds)
        assert torch.equal(token, expected[0])
        assert torch.equal(feature, expected[1])
        torch.testing.assert_close(score, expected[2], rtol=1e-6, atol=1e-5)  # TF32 would not be

    def test_not_a_number_is_above(self):
        x = torch.tensor([[torch.nan], [1.0]], device=DEVICE)
        ones = torch.ones(1, device=DEVICE)
        token, _, score = pairs.pairs_above(x, ones[:, None], ones, None, torch.inf * ones)
        assert token.tolist() == [0]
        assert score.isnan().all()


class TestBlockMaxima:
    @settings(max_examples=25, deadline=None)
    @given(given=inputs(), rows_are_tokens=st.booleans())
    def test_equals_torch(self, given: Inputs, rows_are_tokens: bool):
        scores = scores_slowly(*given)
        thresholds = integers(scores.shape[1])
        found, counts = maxima.block_maxima(*given, thresholds, rows_are_tokens=rows_are_tokens)
        rows = scores if rows_are_tokens else scores.T
        padded = scores.new_full((len(rows), 32 * found.shape[1]), -torch.inf)
        padded[:, : rows.shape[1]] = rows
        assert torch.equal(found, padded.unflatten(1, (found.shape[1], 32)).amax(2))
        assert torch.equal(counts, (scores > thresholds).sum(0, dtype=torch.int32))

    def test_pairs_have_the_same_bits(self):
        torch.manual_seed(0)
        x, weight = torch.randn(300, 70, device=DEVICE), torch.randn(200, 70, device=DEVICE)
        bias, scale = torch.randn(200, device=DEVICE), torch.rand(300, device=DEVICE)
        found, _ = maxima.block_maxima(x, weight, bias, scale, rows_are_tokens=True)
        below = torch.full((200,), -torch.inf, device=DEVICE)
        _, _, score = pairs.pairs_above(x, weight, bias, scale, below)
        blocks = score.view(200, 300).T[:, :192].reshape(300, 6, 32)
        assert torch.equal(found[:, :6], blocks.amax(2))


class TestWithKernel:
    @pytest.mark.parametrize("triton", [True, False])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_kernels_serve_what_they_can(
        self, device: str, dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch
    ):
        @dispatch.with_kernel
        def sum_rows(table: Tensor, bags: int) -> str:
            return f"torch, {bags} bags"

        monkeypatch.setattr(sums, "sum_rows", lambda table, bags: f"kernel, {bags} bags")
        monkeypatch.setattr(dispatch, "_has_triton", lambda: triton)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        with FakeTensorMode():  # needs no GPU
            table = torch.empty(2, 3, dtype=dtype, device=device)
        kernel = device == "cuda" and dtype in DTYPES and triton
        assert sum_rows(table, 5) == f"{'kernel' if kernel else 'torch'}, 5 bags"

    def test_the_package_needs_no_triton(self):
        program = (
            "import sys; sys.modules['triton'] = None\n"
            "from lightning_sae.kernels.dispatch import _has_triton\n"
            "assert not _has_triton()\n"
            "assert 'lightning_sae.kernels.dots' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603 - ours


def test_kernels_compile(tmp_path: Path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, script], env=environment, check=True)  # noqa: S603 - ours
