import math

import pytest
import torch

from lightning_sae.metrics import zipf_statistics
from lightning_sae.zipf import fit_zipf
from tests.test_zipf import N_FEATURES, TOKENS, law, measured

NAMES = {"exponent", "offset", "r2", "r2_middle", "tail_deviation"}


def test_figures_are_those_of_the_fit():
    density = measured(law(1.05, 12))
    figures, fitted = zipf_statistics(density, TOKENS), fit_zipf(density, TOKENS)
    assert figures.keys() == {f"zipf_{name}" for name in NAMES} | {"dying_fraction"}
    for name in NAMES:
        assert figures[f"zipf_{name}"].item() == pytest.approx(getattr(fitted, name), rel=1e-6)
    assert {(value.dtype, value.shape) for value in figures.values()} == {(torch.float32, ())}


@pytest.mark.parametrize(
    ("density", "tokens"),
    [
        (torch.zeros(100), 1000),
        (torch.tensor([0.5, 0.1] + [0.0] * 100), 1000),
        (torch.full((100,), math.nan), 0),  # of a metric that saw no token
    ],
)
def test_nothing_to_fit_is_nothing_to_log(density, tokens):
    assert zipf_statistics(density, tokens) == {}


def test_equal_densities_have_no_goodness_of_fit():
    figures = zipf_statistics(torch.full((100,), 0.1), 10_000)
    assert "zipf_r2" not in figures
    assert all(value.isfinite() for value in figures.values())


def test_bad_densities_are_refused():
    with pytest.raises(ValueError, match=r"within 0 \.\. 1"):
        zipf_statistics(torch.full((100,), 1.5), 1000)
    with pytest.raises(ValueError, match="tokens=-1"):
        zipf_statistics(torch.full((100,), 0.5), -1)


def test_a_lawful_dictionary_has_no_dying_features():
    assert zipf_statistics(measured(law(1.05, 12)), TOKENS)["dying_fraction"] == 0
    # On few tokens many counts are tiny: noise, not dying.
    few = zipf_statistics(measured(law(1.05, 12), 50_000), 50_000)
    assert few["dying_fraction"] < 0.001


@pytest.mark.parametrize("dead", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("dying", [0.0, 0.05, 0.1])
def test_dying_features_are_counted_without_the_dead(dead, dying):
    fate = torch.rand(N_FEATURES, generator=torch.Generator().manual_seed(1))
    rate = torch.where(fate < dead, 0.0, torch.where(fate < dead + dying, 0.02, 1.0))
    # The survivors close ranks, so they follow the law of a smaller dictionary.
    found = zipf_statistics(measured(law(1.05, 12) * rate, 10**8), 10**8)
    assert found["dying_fraction"] == pytest.approx(dying, abs=0.02)


def test_most_features_may_be_dying():
    density = torch.cat([law(1.05, 12, 6000), torch.full((18_000,), 1e-6, dtype=torch.float64)])
    found = zipf_statistics(measured(density, 10**7), 10**7)
    assert found["dying_fraction"] == pytest.approx(0.75, abs=0.01)
