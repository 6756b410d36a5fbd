"""How often a step of training waits for a GPU, on the way that a GPU goes."""

from collections import Counter
from functools import partial

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, TopKSAE
from tests.helpers.superposition import superposition
from tests.helpers.waits import Waits, on_kernels

D_MODEL, N_FEATURES, K, TOKENS = 8, 256, 2, 96
SIZES = (D_MODEL, N_FEATURES, K)

feature_choice = partial(
    FeatureChoiceSAE, *SIZES, mutual_choice_share=0, zipf_exponent=1.0, zipf_offset=2.0
)
STEADY = {
    "topk": (partial(TopKSAE, *SIZES), 3),
    "mutual choice": (partial(MutualChoiceSAE, *SIZES), 5),
    "mutual choice, no discount": (partial(MutualChoiceSAE, *SIZES, rank_discount=0.0), 4),
    "feature choice, first phase": (
        partial(FeatureChoiceSAE, *SIZES, mutual_choice_tokens=10**6),
        5,
    ),
    "feature choice": (feature_choice, 3),
}
"""Rules, and how often each waits in a step in which no feature is dead."""


@pytest.mark.parametrize("rule", STEADY)
def test_a_step_waits_so_often(rule: str, monkeypatch: pytest.MonkeyPatch):
    make, expected = STEADY[rule]
    torch.manual_seed(0)
    sae = make()
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    found: Counter[str] = Counter()
    for step in range(4):  # the first ones set what later ones begin with
        x = superposition(TOKENS, D_MODEL, n_features=32, seed=step)
        with on_kernels(monkeypatch), Waits() as waits:
            loss, _ = sae.loss(x)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            adam.step()
            sae.normalize_decoder()
        found = waits.found
    assert sum(found.values()) == expected, found
