"""FVU of the dictionaries within a dictionary."""

import pytest
import torch

from lightning_sae import MutualChoiceSAE, TopKSAE, UsageError
from lightning_sae.architectures.transcoder import TopKTranscoder
from lightning_sae.metrics import FractionOfVarianceUnexplained, PrefixFVU
from lightning_sae.metrics.collection import collect, of_a_dictionary
from tests.helpers.architectures import D_MODEL, N_FEATURES, activations


def test_each_is_of_its_own_error():
    x, errors = torch.randn(50, 4), [torch.randn(50, 4) for _ in range(3)]
    metrics = collect(of_a_dictionary(4, 16, [2, 5, 9]))
    for rows in (slice(0, 20), slice(20, 50)):
        metrics.update(
            codes=torch.ones(len(x[rows]), 16),
            reconstruction=x[rows],
            activations=x[rows],
            prefix_errors=[each[rows] for each in errors],
        )
    found = metrics.compute()
    for size, error in zip([2, 5, 9], errors, strict=True):
        expected = error.square().sum() / (x - x.mean(0)).square().sum()
        torch.testing.assert_close(found[f"fvu_first_{size}"], expected)
    assert found["fvu"] == 0
    with pytest.raises(UsageError, match="both must be"):
        PrefixFVU(4, 0).update([torch.zeros(50, 3)], torch.zeros(50, 3))


@pytest.mark.parametrize("kind", [MutualChoiceSAE, TopKSAE])
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
def test_of_an_sae_it_is_that_of_the_first_features_alone(kind, normalize_inputs: str):
    torch.manual_seed(0)
    sae = kind(D_MODEL, N_FEATURES, 4, prefixes=[5, 20], normalize_inputs=normalize_inputs)
    x = activations(256) * 3 + 2
    for _ in range(3):
        sae.loss(x)
    sae.on_validation_epoch_start()
    sae.measure(x[:100])
    sae.measure(x[100:])
    for size in (5, 20):
        codes = sae.encode(x)
        codes[:, size:] = 0
        reconstruction = sae.decode(codes, like=x)
        expected = FractionOfVarianceUnexplained(D_MODEL)(reconstruction, x)
        found = sae.measured()[f"fvu_first_{size}"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_of_a_transcoder_it_is_of_the_target():
    torch.manual_seed(0)
    sae = TopKTranscoder(D_MODEL, N_FEATURES, k=4, d_target=6, prefixes=[5], skip=True)
    x = torch.cat([activations(256), torch.randn(256, 6)], dim=1)
    sae.loss(x)
    torch.nn.init.normal_(sae.skip)
    sae.on_validation_epoch_start()
    sae.measure(x)
    codes = sae.encode(x)
    codes[:, 5:] = 0
    target = sae.decode(codes, like=x[:, :D_MODEL])
    expected = FractionOfVarianceUnexplained(6)(target, x[:, D_MODEL:])
    torch.testing.assert_close(sae.measured()["fvu_first_5"], expected, rtol=1e-4, atol=0)


def test_without_prefixes_there_is_none():
    assert not [name for name in of_a_dictionary(4, 16) if "first" in name]
