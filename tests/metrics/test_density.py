import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.metrics import L0, DeadFeatures, FeatureDensity, L0StandardDeviation
from lightning_sae.metrics.base import TotalsMetric
from tests.helpers.matches import matches_where
from tests.metrics.samples import N_FEATURES, sample


@given(tokens=st.integers(1, 30), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_density_is_the_share_of_tokens_on_which_a_feature_fires(tokens, seed):
    codes = sample(tokens, seed)["codes"]
    density = FeatureDensity(N_FEATURES)
    density.update(codes)
    columns = codes.T.tolist()
    expected = [sum(code > 0 for code in column) / tokens for column in columns]
    torch.testing.assert_close(density.compute(), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(7,), (6, 7), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_leading_shape_and_dtype(shape, dtype):
    codes = torch.zeros(shape, dtype=dtype)
    codes[..., 3] = 0.5
    density = FeatureDensity(7)
    density.update(codes)
    assert density.compute().tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert density.tokens == codes.numel() // 7


@pytest.mark.parametrize("shape", [(2, 6), (7, 2), ()])
def test_codes_of_another_dictionary_are_refused(shape):
    with pytest.raises(ValueError, match=r"last dimension must be n_features=7"):
        FeatureDensity(7).update(torch.zeros(shape))


@pytest.mark.parametrize("n_features", [0, -3])
def test_a_dictionary_has_features(n_features):
    with pytest.raises(ValueError, match=f"n_features={n_features}"):
        FeatureDensity(n_features)


@pytest.mark.parametrize(
    "metric", [FeatureDensity(5), DeadFeatures(5), L0(), L0StandardDeviation()]
)
def test_matches_count_as_their_dense_codes_do(metric: TotalsMetric):
    codes = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).clamp_min(0)
    metric.update(codes)
    dense = metric.compute()
    metric.reset()
    metric.update(matches_where(codes, codes > 0))
    assert torch.equal(metric.compute(), dense)
