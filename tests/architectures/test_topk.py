"""TopK: the same number of matches for every token."""

import torch

from lightning_sae import TopKSAE
from tests.helpers.superposition import superposition


def test_every_token_gets_its_k_largest_affinities():
    torch.manual_seed(0)
    sae = TopKSAE(8, 24, k=3)
    x = superposition(128, 8, n_features=16, seed=0)
    sae.loss(x)
    codes = sae.encode(x)
    affinities = (x * sae.input_scale - sae.b_dec) @ sae.encoder.weight.T
    expected = affinities.topk(3).values.relu()
    torch.testing.assert_close(codes.topk(3).values, expected)
    assert (codes > 0).sum(1).max() == 3
    torch.testing.assert_close(sae.eval().encode(x), codes)  # no batch, no threshold needed
