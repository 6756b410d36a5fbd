"""SAEs without scales of their own."""

from dataclasses import replace

import pytest
import torch

from lightning_sae import MutualChoiceSAE, SparseAutoencoder, StandardSAE, UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.interop import fold, unfold
from tests.helpers.foreign import assert_same, every_kind, tokens, trained


@every_kind
@pytest.mark.parametrize("importance", ["affinity", "token_norm"])
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
@pytest.mark.parametrize("rank_discount", [0.0, 1.0])
def test_it_does_what_the_sae_does(kind, importance, normalize_inputs, rank_discount):
    options = {} if kind in ("standard", "jumprelu", "gated") else {"importance": importance}
    options |= {"rank_discount": rank_discount} if "choice" in kind else {}
    sae, x = trained(kind, normalize_inputs=normalize_inputs, **options), tokens()
    codes, reconstruction = fold(sae)(x)
    same = ((codes > 0) == (sae.encode(x) > 0)).all(1)
    assert same.sum() >= len(x) - 2
    torch.testing.assert_close(reconstruction[same], sae(x)[same], rtol=1e-5, atol=1e-3)
    # Codes are in the units of activations, or of their length sqrt(d_model); ours have a scale.
    scale = sae.scales(torch.ones(1, sae.d_model))
    torch.testing.assert_close((codes * scale)[same], sae.encode(x)[same], rtol=1e-4, atol=1e-4)


@every_kind
def test_mean_and_scale_are_measured_if_there_is_something_to_measure(kind: str):
    sae = trained(kind)
    again = unfold(fold(sae), k=4, activations=tokens(1024))
    assert_same(sae, again)
    torch.testing.assert_close(again.input_mean, tokens(1024).mean(0), rtol=0.05, atol=0)
    expected, found = (each.loss(tokens())[1]["reconstruction_loss"] for each in (sae, again))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_what_comes_back_learns_on():
    sae = unfold(fold(trained("topk")), activations=tokens(1024)).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss, _ = sae.loss(tokens(1024))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_has_no_threshold_yet_is_refused():
    with pytest.raises(UsageError, match="threshold of MutualChoiceSAE is not calibrated"):
        fold(MutualChoiceSAE(16, 48, 4, rank_discount=0))


def test_what_no_gate_can_say_is_refused():
    with pytest.raises(UsageError, match="importance='gain' depends on more than affinities"):
        fold(trained("topk", importance="gain"))

    class Own(StandardSAE):
        gate = SparseAutoencoder.gate

    with pytest.raises(UsageError, match="Own does not say by a method `gate` what its codes are"):
        fold(Own(16, 48))


def test_k_must_be_known_where_nothing_says_it():
    folded = replace(fold(trained("mutual_choice")), record={})
    with pytest.raises(UsageError, match="k is not known"):
        unfold(folded)
    assert unfold(folded, k=7).k == 7


def test_thresholds_of_zero_are_none():
    folded = fold(trained("standard"))
    zero = replace(folded, gate=Gate(threshold=torch.zeros(len(folded.encoder_bias))))
    assert isinstance(unfold(zero), StandardSAE)
