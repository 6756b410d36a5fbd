"""How often a step of training waits for a GPU, on the way that a GPU goes."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, TopKSAE
from tests.helpers.superposition import superposition
from tests.helpers.waits import Waits, on_kernels

D_MODEL, N_FEATURES, K, TOKENS = 32, 256, 4, 128
SIZES = (D_MODEL, N_FEATURES, K)

feature_choice = partial(
    FeatureChoiceSAE, *SIZES, mutual_choice_share=0, zipf_exponent=1.0, zipf_offset=2.0
)
RULES = {
    "topk": partial(TopKSAE, *SIZES),
    "mutual choice": partial(MutualChoiceSAE, *SIZES),
    "mutual choice, no discount": partial(MutualChoiceSAE, *SIZES, rank_discount=0.0),
    "feature choice, first phase": partial(FeatureChoiceSAE, *SIZES, mutual_choice_tokens=10**6),
    "feature choice": feature_choice,
}
LOOK = "host_copy.py:look tolist"
"""How many were found and whether that was all: the one thing that a step asks the device."""


def last_step(make: Callable[[], SparseAutoencoder], patch: pytest.MonkeyPatch) -> Counter[str]:
    """Return where the fourth step of a training waits."""
    torch.manual_seed(0)
    sae = make()
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    found: Counter[str] = Counter()
    for step in range(4):  # the first ones set what later ones begin with
        x = superposition(TOKENS, D_MODEL, n_features=64, seed=step)
        with on_kernels(patch), Waits() as waits:
            loss, _ = sae.loss(x)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            adam.step()
            sae.normalize_decoder()
        found = waits.found
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_step_waits_once(rule: str, monkeypatch: pytest.MonkeyPatch):
    found = last_step(RULES[rule], monkeypatch)
    assert found == Counter({LOOK: 1}), found


def test_what_waits_is_counted():
    x = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        _ = x[x > 0], x.nonzero(), x.sum().item(), bool(x[0]), x.tolist(), x.cpu(), x.unique()
        _ = torch.tensor(2.0), x[0], x[:1], x.where(x > 0, 0)
    assert sum(waits.found.values()) == 8, waits.found
