import pytest
import torch

from lightning_sae.checks import UsageError
from lightning_sae.data import KnownFeatures
from lightning_sae.matches import Matches

TOKENS = 40_000


def made(**changed):
    return KnownFeatures(**{"d_model": 16, "features": 60, "l0": 5.0} | changed)


def alike(left: Matches, right: Matches) -> bool:
    names = ("token", "feature", "value")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def off(found, expected) -> float:
    """How many standard errors a share over the tokens is off, at most."""
    error = (expected * (1 - expected) / TOKENS).sqrt()
    return float(((found - expected) / error).abs().max())


@pytest.mark.parametrize("dependence", [{}, {"correlation": 0.6}, {"children": 2}])
def test_densities_follow_the_law_however_features_depend_on_each_other(dependence):
    truth = made(zipf_exponent=0.8, zipf_offset=3.0, **dependence)
    law = (torch.arange(1, 61, dtype=torch.float64) + 3) ** -0.8
    torch.testing.assert_close(truth.density, 5 * law / law.sum())
    codes = truth.draw(TOKENS, key=(0,))
    assert off(codes.per_feature() / TOKENS, truth.density) < 4
    assert (codes.value > 0).all()
    assert codes.value.mean().item() == pytest.approx(1, abs=0.01)
    assert codes.value.std().item() == pytest.approx(truth.spread, abs=0.01)


def test_what_is_drawn_is_a_function_of_the_seed_and_the_key():
    first = made().draw(200, key=(1, 7))
    assert alike(first, made().draw(200, key=(1, 7)))
    assert not alike(first, made().draw(200, key=(1, 8)))
    other = made(seed=1)
    assert not alike(first, other.draw(200, key=(1, 7)))
    assert not torch.equal(other.directions, made().directions)


def test_activations_are_sums_of_unit_directions():
    truth = made(l0=0.5)  # many tokens have none
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(60))
    codes = truth.draw(300, key=(0,))
    assert (codes.per_token() == 0).any()
    torch.testing.assert_close(truth.activations(codes), codes.to_dense() @ truth.directions)


def test_features_by_themselves_are_independent_and_correlated_ones_are_not():
    def correlations(**changed):
        fires = made(features=20, **changed).draw(TOKENS, key=(0,)).to_dense().double() > 0
        found = torch.corrcoef(fires.double().T).fill_diagonal_(0)
        return found.square().mean().sqrt().item()

    assert correlations() < 1.5 / TOKENS**0.5
    assert correlations(correlation=0.6) > 0.06


def test_children_fire_only_where_their_parent_does():
    truth = made(features=10, l0=2.0, children=2)
    assert truth.parent.tolist() == [-1, -1, -1, 0, 1, 2, 0, 1, 2, -1]  # one is left over
    fires = truth.draw(TOKENS, key=(0,)).to_dense() > 0
    for child, parent in enumerate(truth.parent.tolist()):
        if parent >= 0:
            assert fires[fires[:, child], parent].all()
            share = (truth.density[child] / truth.density[parent]).item()
            found = fires[fires[:, parent], child].double().mean().item()
            assert found == pytest.approx(share, abs=0.02)
    left_over = fires[fires[:, 9]].double().mean(0)[:3]
    torch.testing.assert_close(left_over, truth.density[:3], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"l0": 40.0},
            r"true_l0=40.0: the densest of true_features=60 would fire on",
        ),
        ({"l0": 0.0}, "would fire on a share 0 of tokens"),
        ({"features": 0}, "true_features=0 must be at least 1"),
        ({"correlation": 1.0}, "correlation=1.0 must be a share"),
        ({"children": -1}, "children=-1 must be"),
        ({"zipf_offset": -1.0}, "zipf_offset=-1.0 must be"),
    ],
)
def test_mistakes_are_told(changed, said):
    with pytest.raises(UsageError, match=said):
        made(**changed)
