"""Loss terms against their formulas."""

import torch

from lightning_sae.allocation import threshold_choice
from lightning_sae.core.losses import reconstruction_loss, sparsity_loss


def test_reconstruction_loss_is_the_mean_square():
    assert reconstruction_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]])) == 2.5


def test_sparsity_loss_is_the_l1_norm_per_token_and_dimension():
    matches = threshold_choice(torch.tensor([[1.0, 2.0, -5.0], [0.0, 3.0, 0.0]]), 0.0)
    assert sparsity_loss(matches, d_model=4) == 6 / 2 / 4
