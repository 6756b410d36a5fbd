"""Nearest features, against all cosines at once."""

import pytest
import torch

import lightning_sae.report.nearest as nearest
from lightning_sae.report import nearest_features


@pytest.mark.parametrize("rows", [3, 1024])
def test_they_have_the_largest_cosines(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nearest, "ROWS", rows)
    directions = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    found, cosines = nearest_features(directions, n=3)
    for feature in range(10):
        each = torch.cosine_similarity(directions[feature : feature + 1], directions)
        order = [i for i in each.argsort(descending=True).tolist() if i != feature][:3]
        assert found[feature].tolist() == order
        torch.testing.assert_close(cosines[feature], each[order])


def test_there_may_be_no_others():
    assert nearest_features(torch.ones(1, 4))[0].shape == (1, 0)
