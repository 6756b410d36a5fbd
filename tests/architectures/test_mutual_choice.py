"""Mutual Choice: the budget is that of the batch."""

import torch

from lightning_sae import MutualChoiceSAE
from tests.helpers.superposition import superposition


def test_the_budget_is_of_the_batch_not_of_the_token():
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, k=3)
    _, stats = sae.loss(superposition(128, 8, n_features=16, seed=0))
    assert stats["l0"] == 3
    assert stats["l0_std"] > 0
