"""Dictionaries within a dictionary: against one dense product for each."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, UsageError
from lightning_sae.allocation import Matches
from lightning_sae.core.nested import split
from tests.helpers.architectures import D_MODEL, N_FEATURES, activations, every_architecture
from tests.helpers.superposition import superposition

PREFIXES = [3, 10, 47]


def dense(sae: SparseAutoencoder, scaled: Tensor, matches: Matches) -> list[Tensor]:
    """What each dictionary leaves of activations, by products with all of its features."""
    order = sae.prefix_order()
    place = torch.arange(N_FEATURES) if order is None else order
    codes, directions = matches.to_dense(), functional.normalize(sae.W_dec, dim=1)
    sizes = [*(sae.prefixes or []), N_FEATURES]
    return [scaled - (codes * (place < size)) @ directions - sae.b_dec for size in sizes]


@every_architecture
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
def test_value_and_gradient_are_those_of_dense_products(make, prefixes, monkeypatch):
    torch.manual_seed(0)
    sae = make(prefixes=prefixes).double()
    for _ in range(6):  # some choose by features after a few batches
        sae.loss(activations(256).double())
    x, reference = activations(64).double(), copy.deepcopy(sae)
    loss, stats = sae.loss(x)
    loss.backward()
    monkeypatch.setattr(reference, "errors", partial(dense, reference))
    expected, expected_stats = reference.loss(x)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert stats["fvu"].item() == pytest.approx(expected_stats["fvu"].item())
    for (name, ours), theirs in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_each_match_is_decoded_once():
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(20, 12, generator=generator)
    token, feature = (codes > 0.6).nonzero(as_tuple=True)
    matches = Matches(token, feature, codes[token, feature], (20, 12))
    for order in (None, torch.randperm(12, generator=generator)):
        parts = split(matches, [2, 7], order)
        assert len(parts) == len(matches)
        assert (parts.token.diff() >= 0).all()
        place = torch.arange(12) if order is None else order
        whole = parts.to_dense().view(20, 3, 12)
        torch.testing.assert_close(whole.sum(1), matches.to_dense())
        for group, (start, stop) in enumerate([(0, 2), (2, 7), (7, 12)]):
            assert not whole[:, group, (place < start) | (place >= stop)].any()
        token, feature, by_feature = parts.by_feature
        assert (feature.diff() >= 0).all()
        assert torch.equal(token, parts.token[by_feature])


def test_budgets_decide_which_features_are_in_a_prefix():
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(
        *(D_MODEL, N_FEATURES, 4),
        prefixes=[8],
        mutual_choice_tokens=1024,
        budgets="measured",
    )
    assert sae.prefix_order() is None
    for step in range(6):
        sae.loss(superposition(256, D_MODEL, n_features=32, seed=step) * 7 + 20)
    assert sae.choosing
    first = sae.prefix_order() < 8
    assert first.sum() == 8
    assert sae.target_density[first].min() >= sae.target_density[~first].max()


def test_first_features_learn_to_reconstruct_by_themselves():
    def error_of_the_first(prefixes) -> float:
        torch.manual_seed(0)
        sae = MutualChoiceSAE(D_MODEL, N_FEATURES, 4, prefixes=prefixes)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for step in range(150):
            loss, _ = sae.loss(superposition(256, D_MODEL, n_features=32, seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.normalize_decoder()
        x = superposition(512, D_MODEL, n_features=32, seed=1000)
        codes = sae.encode(x)
        codes[:, 12:] = 0
        return (sae.decode(codes, like=x) - x).square().mean().item()

    assert error_of_the_first([12]) < 0.8 * error_of_the_first(None)


@pytest.mark.parametrize("prefixes", [[0], [4, 4], [8, 4], [N_FEATURES], [-1, 4]])
def test_prefixes_that_do_not_ascend_are_refused(prefixes: list[int]):
    with pytest.raises(UsageError, match=r"prefixes=\[.*\] must ascend, from at least 1 to less"):
        MutualChoiceSAE(D_MODEL, N_FEATURES, 4, prefixes=prefixes)


def test_they_are_noted():
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, 4, prefixes=(4, 8))
    assert MutualChoiceSAE(**sae.hparams).prefixes == [4, 8]
