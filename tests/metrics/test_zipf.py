import math

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_sae.metrics import DeadFeatures, FeatureDensity, ZipfStatistics, zipf_statistics
from lightning_sae.metrics import density as counting
from lightning_sae.metrics.zipf import dying_features
from lightning_sae.zipf import DYING_BELOW, fit_zipf
from tests.helpers.ddp import run_on_two
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
    assert zipf_statistics(measured(law(1.05, 12), 10**7), 10**7)["dying_fraction"] == 0
    # On few tokens many counts are tiny: noise, not dying. It passes for that where the rarest
    # are expected to fire just often enough to be judged, as on 200,000 tokens here.
    for tokens, noise in ((50_000, 0.001), (200_000, 0.01), (TOKENS, 0.001)):
        few = zipf_statistics(measured(law(1.05, 12), tokens), tokens)
        assert few["dying_fraction"] < noise


@pytest.mark.parametrize(
    ("share", "dying"), [(1.0, 0.0), (0.76, 0.0), (0.74, 0.1), (0.5, 0.1), (0.01, 0.1), (0.0, 0.0)]
)
@pytest.mark.parametrize("dead", [0, 800])
def test_dying_is_below_three_quarters_of_the_law_as_a_share_of_all_features(share, dying, dead):
    """Of 1,000 or 1,800 features the rarest 100 that live have a share of their lawful density."""
    assert DYING_BELOW == 0.75
    density = 0.5 / (torch.arange(1, 1001) + 3.0)
    density[900:] *= share
    figures = zipf_statistics(torch.cat([density, torch.zeros(dead)]), 10**9)
    assert figures["zipf_exponent"].item() == pytest.approx(1, abs=0.001)  # the others' law
    assert figures["dying_fraction"].item() == pytest.approx(dying * 1000 / (1000 + dead))


def test_it_says_which_features_are_dying_in_whatever_order_they_are():
    density = 0.5 / (torch.arange(1, 1001) + 3.0)
    density[900:950] *= 0.1
    density[950:] = 0  # dead
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    dying = dying_features(density[order], 10**7, fit_zipf(density, 10**7))
    assert dying.tolist() == [900 <= rank < 950 for rank in order.tolist()]


def test_where_the_law_expects_too_few_firings_none_is_dying():
    density = 0.5 / (torch.arange(1, 1001) + 3.0)
    density[850:] /= 2
    expected = 36_000 * fit_zipf(density, 36_000).density(torch.arange(1, 1001))
    assert expected[880] > 20 > expected[890]  # of features that are all at half the law
    found = zipf_statistics(density, 36_000)["dying_fraction"].item()
    assert found == pytest.approx(((expected >= 20).sum().item() - 850) / 1000)


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


def codes(tokens: int, seed: int = 0) -> torch.Tensor:
    """Codes of 60 features whose densities follow a law, those of the last ten halved."""
    density = 0.9 / torch.arange(1, 61)
    density[50:] /= 2
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, 60, generator=draw) < density).float()


def test_the_metric_has_the_figures_of_its_densities():
    metric, density, seen = ZipfStatistics(60), FeatureDensity(60), 0
    for tokens in (4000, 6000):
        batch = codes(tokens, seed=tokens)
        metric.update(batch)
        density.update(batch)
        seen += tokens
        figures = metric.compute()
        assert figures == zipf_statistics(density.compute(), seen)
        assert figures["dying_fraction"] > 0.1
    metric.reset()
    metric.update(codes(10))
    assert metric.compute() == {}  # too few firings for a fit


def test_counts_are_shared_with_density_and_dead_features(monkeypatch):
    updates, update = [], counting._density_update
    monkeypatch.setattr(
        counting, "_density_update", lambda codes: updates.append(len(codes)) or update(codes)
    )
    kinds = {"density": FeatureDensity, "dead": DeadFeatures, "zipf": ZipfStatistics}
    collection = MetricCollection({name: kind(60) for name, kind in kinds.items()})
    batches = [codes(tokens, seed=tokens) for tokens in (3000, 4000, 5000)]
    for batch in batches:
        collection.update(codes=batch)
    assert updates == [3000] * 3 + [4000, 5000]  # torchmetrics compares after the first
    density, dead, zipf = dict(collection.items(copy_state=False)).values()
    assert density.fires is dead.fires is zipf.fires
    assert density.tokens is dead.tokens is zipf.tokens
    together, alone = collection.compute(), ZipfStatistics(60)
    alone.update(torch.cat(batches))
    for name, value in alone.compute().items():
        assert together[name] == value


def figures_of_rank(rank: int) -> dict[str, float]:
    metric = ZipfStatistics(60)
    metric.update(codes(10_000)[[slice(0, 1000), slice(1000, None)][rank]])
    return {name: value.item() for name, value in metric.compute().items()}


def test_two_ranks_fit_what_one_does():
    expected = zipf_statistics(codes(10_000).mean(0), 10_000)
    assert len(expected) == 6
    for found in run_on_two(figures_of_rank):
        assert found == pytest.approx({name: value.item() for name, value in expected.items()})
