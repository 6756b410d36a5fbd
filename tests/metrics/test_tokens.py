"""Tokens are counted, whatever form their codes have."""

import torch

from lightning_sae.metrics import TokenCount
from tests.helpers.matches import matches_where


def test_tokens_are_counted_not_what_fires_on_them():
    count = TokenCount()
    codes = torch.zeros(2, 3, 8)
    codes[0, 0, :5] = 1
    count.update(codes)
    assert count.compute() == 6
    count.update(matches_where(codes[0], codes[0] > 0))
    assert count.compute() == 6 + 3
    count.update(torch.zeros(0, 8))
    assert count.compute() == 9
    assert count.compute().dtype == torch.int64
