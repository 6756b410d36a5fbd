import doctest
import math
import time
from itertools import product

import pytest
import torch

from lightning_sae import zipf
from lightning_sae.zipf import ZipfFitError, ZipfMandelbrot, fit_zipf

N_FEATURES = 24_576
TOKENS = 1_000_000


def law(exponent, offset, n_features=N_FEATURES, matches_per_token=32.0):
    """Zipf-Mandelbrot densities that sum to `matches_per_token`, or less if the first would be
    above 0.6."""
    shape = (torch.arange(1, n_features + 1, dtype=torch.float64) + offset) ** -exponent
    return shape * min(matches_per_token / shape.sum(), 0.6 / shape[0])


def measured(density, tokens=TOKENS, seed=0):
    """Densities as counted on `tokens` tokens, in random order of features."""
    generator = torch.Generator().manual_seed(seed)
    density = density[torch.randperm(len(density), generator=generator)]
    counts = torch.poisson(density * tokens, generator=generator)
    return (counts / tokens).clamp(max=1).float()


def test_doctests():
    assert doctest.testmod(zipf).failed == 0


@pytest.mark.parametrize(
    ("tokens", "error"), [(100_000, 0.05), (1_000_000, 0.02), (10_000_000, 0.01)]
)
@pytest.mark.parametrize("n_features", [512, 2048, N_FEATURES])
def test_fit_recovers_known_laws(n_features, tokens, error):
    """The exponent to 1 %; the offset to what `error` says, for want of tokens."""
    for exponent in (0.6, 0.8, 1.05, 1.3, 1.5):
        for offset in (1, 3, 12, 50):
            density = law(exponent, offset, n_features)
            fitted = fit_zipf(measured(density, tokens), tokens)
            assert fitted.exponent == pytest.approx(exponent, rel=0.01), (exponent, offset)
            assert fitted.offset == pytest.approx(offset, rel=error), (exponent, offset)
            ranks = torch.tensor([1, 10, 100])
            torch.testing.assert_close(fitted.density(ranks), density[ranks - 1], rtol=0.02, atol=0)


@pytest.mark.parametrize("exponent", [0.6, 1.05, 1.5])
def test_fit_recovers_a_law_without_offset(exponent):
    fitted = fit_zipf(measured(law(exponent, 0)), TOKENS)
    assert fitted.exponent == pytest.approx(exponent, rel=0.01)
    assert fitted.offset == pytest.approx(0, abs=0.05)


def test_fit_of_few_tokens_is_not_biased_by_sorting():
    """The order of noisy counts is steeper at its end than the law: plain regression sees that."""
    density = law(1.05, 12)
    fits = [fit_zipf(measured(density, 100_000, seed), 100_000).exponent for seed in range(5)]
    assert sum(fits) / 5 == pytest.approx(1.05, abs=0.0015)


def test_fit_agrees_with_a_brute_force_poisson_likelihood():
    """On the ranks that are fitted, the maximum of the likelihood lies where least squares ends."""
    density = measured(law(0.9, 5, n_features=2000), 10_000_000)
    fitted = fit_zipf(density, 10_000_000)
    counts = (density.double().sort(descending=True).values * 10_000_000)[:1620]
    ranks = torch.arange(1, 1621, dtype=torch.float64)

    def log_likelihood(exponent, offset):
        shape = (ranks + offset) ** -exponent
        expected = shape * counts.sum() / shape.sum()  # the best scale for this shape
        return float((counts * expected.log() - expected).sum())

    best = max(
        (log_likelihood(0.85 + 0.005 * i, 4 + 0.1 * j), 0.85 + 0.005 * i, 4 + 0.1 * j)
        for i in range(21)
        for j in range(21)
    )
    assert fitted.exponent == pytest.approx(best[1], abs=0.006)
    assert fitted.offset == pytest.approx(best[2], abs=0.3)


def test_goodness_of_an_exact_law_and_of_a_broken_tail():
    exact = fit_zipf(law(1.05, 12), 10**9)
    assert exact.r2 > 0.9999
    assert exact.r2_middle > 0.9999
    assert exact.tail_deviation < 0.01

    density = law(1.05, 12)
    density[22_000:] /= 10
    broken = fit_zipf(density, 10**9)
    assert broken.exponent == pytest.approx(1.05, abs=0.001)  # the tail is not fitted
    assert broken.tail_deviation == pytest.approx(math.log(10), abs=0.01)
    assert broken.r2 < 0.9
    assert broken.r2_middle > 0.9999


def test_goodness_is_what_its_definition_says():
    density = measured(law(1.2, 4, n_features=1000), 100_000)
    fitted = fit_zipf(density, 100_000)
    observed = density[density > 0].sort(descending=True).values.double()
    assert len(observed) == 1000
    expected = fitted.density(torch.arange(1, 1001))
    ratio = (observed / expected).log()

    def r2(part):
        logs = observed[part].log()
        return float(1 - ratio[part].square().sum() / (logs - logs.mean()).square().sum())

    assert fitted.r2 == pytest.approx(r2(slice(None)), abs=1e-9)
    assert fitted.r2_middle == pytest.approx(r2(slice(3, 810)), abs=1e-9)
    assert fitted.tail_deviation == pytest.approx(float(ratio[810:].abs().max()), abs=1e-9)


@pytest.mark.parametrize("n_features", [512, 3072, N_FEATURES])
def test_fit_is_sane_when_most_features_are_dead(n_features):
    """Lognormal rates of the live tenth end in a cliff, which once gave s=7 and q=242."""
    generator = torch.Generator().manual_seed(0)
    rates = (3 * torch.randn(n_features, generator=generator)).exp().double()
    rates[torch.rand(n_features, generator=generator) < 0.9] = 0
    density = measured((rates / rates.sum() * 8).clamp(max=0.9))
    fitted = fit_zipf(density, TOKENS)
    live = int((density > 0).sum())
    assert 0.1 <= fitted.exponent <= 3
    assert 0 <= fitted.offset <= live / 10
    assert 0.01 < fitted.density(torch.tensor(1)) < 10


CLIFFS = set(product([2048, N_FEATURES], [0, 1, 5, 20, 100, 1000], [TOKENS, 10 * TOKENS]))
CLIFFS -= {(N_FEATURES, 1000, TOKENS)}  # as often as the living: no cliff


@pytest.mark.parametrize(("n_features", "firings", "tokens"), sorted(CLIFFS))
def test_a_cliff_is_not_fitted(n_features, firings, tokens):
    """Three quarters of the features are dead, or nearly: they fire that often."""
    living = law(1.05, 12, n_features // 4)
    rest = torch.full((n_features - n_features // 4,), firings / tokens, dtype=torch.float64)
    fitted = fit_zipf(measured(torch.cat([living, rest]), tokens), tokens)
    assert fitted.exponent == pytest.approx(1.05, rel=0.01)
    assert fitted.offset == pytest.approx(12, rel=0.03)
    if firings > 0:
        assert fitted.r2_middle < 0.9


def test_a_law_that_bends_is_followed_as_far_as_it_holds():
    """Lognormal densities fall ever more steeply, but that is no cliff."""
    rates = (2 * torch.randn(N_FEATURES, generator=torch.Generator().manual_seed(0))).exp().double()
    density = measured((rates / rates.sum() * 16).clamp(max=0.9))
    fitted = fit_zipf(density, TOKENS)
    ranks = torch.tensor([10, 100, 1000, 5000])
    found = density.double().sort(descending=True).values[ranks - 1]
    torch.testing.assert_close(fitted.density(ranks), found, rtol=0.35, atol=0)
    assert fitted.tail_deviation > 1


def test_fit_of_equal_densities_does_not_crash():
    fitted = fit_zipf(torch.full((100,), 0.1), 10_000)
    assert fitted.exponent == pytest.approx(0.1)
    assert not fitted.r2 > 0


def test_fit_is_fast():
    density = measured(law(1.05, 12))
    fit_zipf(density, TOKENS)
    start = time.process_time()
    fit_zipf(density, TOKENS)
    assert time.process_time() - start < 0.05  # 4 ms on an idle core


@pytest.mark.parametrize(
    ("density", "tokens"),
    [
        (torch.zeros(100), 1000),
        (torch.zeros(0), 1000),
        (torch.tensor([0.5, 0.1] + [0.0] * 100), 1000),
        (law(1.0, 5, n_features=100).float(), 10),
    ],
)
def test_too_few_live_features_cannot_be_fitted(density, tokens):
    with pytest.raises(ZipfFitError, match=r"needs 10 features .*: measure on more tokens"):
        fit_zipf(density, tokens)


@pytest.mark.parametrize(
    ("density", "tokens"),
    [
        (torch.full((100,), 1.5), 1000),
        (torch.full((100,), -0.5), 1000),
        (torch.full((100,), math.nan), 1000),
        (torch.full((10, 10), 0.5), 1000),
        (torch.full((100,), 0.5), 0),
    ],
)
def test_bad_densities_are_refused(density, tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}.*within 0 .. 1") as error:
        fit_zipf(density, tokens)
    assert not isinstance(error.value, ZipfFitError)
    assert "\n" not in str(error.value)


def test_a_fit_is_a_value():
    density = law(1.0, 5, n_features=1000)
    assert fit_zipf(density, TOKENS) == fit_zipf(density.flip(0), TOKENS)
    assert isinstance(fit_zipf(density, TOKENS), ZipfMandelbrot)
