"""Weighted sums and dot products of a table's rows, against loops."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_sae.matches import Matches
from lightning_sae.sparse import rows
from lightning_sae.sparse.rows import dot_rows, is_dense, sum_rows, sum_segments, widened_again

BAG, ROW = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([3, 0, 3, 3, 1])
BAGS = 4  # two of them empty, one the last


def table_and_weight() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return table, torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)


def test_rows_are_added_up_bag_by_bag():
    table, weight = table_and_weight()
    expected = torch.zeros(BAGS, 3, dtype=torch.float64)
    for bag, row, factor in zip(BAG, ROW, weight.detach(), strict=True):
        expected[bag] += factor * table[row]
    torch.testing.assert_close(sum_rows(table, BAG, ROW, weight, BAGS).detach(), expected)
    starts = torch.tensor([0, 2, 2, 5, 5])
    torch.testing.assert_close(sum_segments(table, ROW, weight, starts).detach(), expected)


def test_weights_alone_have_a_gradient():
    table, weight = table_and_weight()
    table.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sum_rows(table, BAG, ROW, w, BAGS), weight)
    sum_rows(table, BAG, ROW, weight, BAGS).sum().backward()
    assert table.grad is None


def test_sixteen_bits_are_kept_and_widened_again():
    table, weight = table_and_weight()
    narrow, weight = table.bfloat16(), weight.detach().float().requires_grad_()
    expected = torch.autograd.grad(sum_rows(narrow.float(), BAG, ROW, weight, BAGS).sum(), weight)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide = narrow.float()
        with widened_again(narrow, wide):
            total = sum_rows(wide, BAG, ROW, weight, BAGS).sum()
    assert not any(each.data_ptr() == wide.data_ptr() for each in kept)
    assert torch.equal(*torch.autograd.grad(total, weight), *expected)


def test_dot_rows_are_entries_of_the_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "_ENTRIES", 8)
    left, right = torch.randn(6, 5), torch.randn(9, 5)
    one, other = torch.randint(0, 6, (20,)), torch.randint(0, 9, (20,))
    torch.testing.assert_close(dot_rows(left, one, right, other), (left @ right.T)[one, other])


@pytest.mark.parametrize(("matches", "dense"), [(2, False), (3, True)])
def test_what_is_dense_is_a_share_of_all_pairs(matches: int, dense: bool):
    zeros = torch.zeros(matches, dtype=torch.int64)
    assert is_dense(Matches(zeros, zeros, zeros.float(), shape=(2, 16))) is dense
