"""Budgets by a law: within bounds, to the total, and rounded without favour."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.allocation import round_budgets, shared_out, zipf_budgets

N_FEATURES = 24_576


@st.composite
def feasible_budgets(draw):
    n_features = draw(st.integers(1, 300))
    minimum = draw(st.sampled_from([0.0, 0.25, 1.0, 3.0]))
    maximum = minimum + draw(st.floats(0.1, 1000))
    total = n_features * (minimum + draw(st.floats(0, 1)) * (maximum - minimum))
    total = min(max(total, n_features * minimum), n_features * maximum)
    return {
        "total": total,
        "n_features": n_features,
        "minimum": minimum,
        "maximum": maximum,
        "exponent": draw(st.floats(0, 3)),
        "offset": draw(st.floats(0, 50)),
    }


@settings(deadline=None, derandomize=True, max_examples=300)
@given(feasible_budgets())
def test_budgets_follow_the_law_within_bounds_and_sum_to_the_total(arguments):
    budgets = zipf_budgets(**arguments)
    assert budgets.dtype == torch.float64
    assert budgets.shape == (arguments["n_features"],)
    assert float(budgets.sum()) == pytest.approx(arguments["total"], rel=1e-9)
    assert (budgets >= arguments["minimum"]).all()
    assert (budgets <= arguments["maximum"]).all()
    assert (budgets[1:] <= budgets[:-1]).all()
    ranks = torch.arange(1, arguments["n_features"] + 1, dtype=torch.float64)
    shape = (ranks + arguments["offset"]) ** -arguments["exponent"]
    free = (budgets > arguments["minimum"]) & (budgets < arguments["maximum"])
    scale = (budgets / shape)[free]
    if len(scale):
        torch.testing.assert_close(scale, scale[0].expand_as(scale), rtol=1e-9, atol=0)
        capped = budgets == arguments["maximum"]  # they would be larger still
        assert (shape[capped] * scale[0] >= arguments["maximum"] * (1 - 1e-9)).all()
        lifted = budgets == arguments["minimum"]
        assert (shape[lifted] * scale[0] <= arguments["minimum"] * (1 + 1e-9)).all()


def test_exponent_zero_is_uniform():
    budgets = zipf_budgets(96, 64, exponent=0.0, maximum=100)
    torch.testing.assert_close(budgets, torch.full((64,), 1.5, dtype=torch.float64))


def test_offset_defaults_to_a_thousandth_of_the_features():
    given = zipf_budgets(32 * 4096, N_FEATURES, maximum=4096, offset=24.576)
    assert torch.equal(given, zipf_budgets(32 * 4096, N_FEATURES, maximum=4096))


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=100), st.data())
def test_shares_are_in_proportion_to_weights_between_the_bounds(weights, data):
    minimum = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    maximum = minimum + data.draw(st.floats(0.1, 100))
    share = data.draw(st.floats(0.01, 1))
    total = len(weights) * (minimum + share * (maximum - minimum))
    weights = torch.tensor(weights, dtype=torch.float64)
    budgets = shared_out(total, weights, minimum=minimum, maximum=maximum)
    assert float(budgets.sum()) == pytest.approx(total, rel=1e-9)
    assert minimum <= budgets.min() <= budgets.max() <= maximum
    free = (budgets > minimum * (1 + 1e-9)) & (budgets < maximum * (1 - 1e-9))
    scale = (budgets / weights)[free]
    if len(scale):
        assert (scale / scale[0]).tolist() == pytest.approx([1.0] * len(scale))
        assert (budgets <= (weights * scale[0]).clamp_min(minimum) * (1 + 1e-9)).all()


def test_budgets_of_gpt2_scale():
    budgets = zipf_budgets(32 * 4096, N_FEATURES, maximum=0.2 * 4096)
    assert float(budgets.sum()) == pytest.approx(32 * 4096, abs=1e-6)
    assert budgets[0] > 100 * budgets[-1] >= 100
    assert int(round_budgets(budgets, seed=7).sum()) == 32 * 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"total": 100, "n_features": 512, "maximum": 10},
            r"total=100 .* of 512\.0 \.\. 5120 can be, or .* minimum <= 0\.1953125 <= maximum",
        ),
        ({"total": 600, "n_features": 10, "maximum": 50}, r"total=600 .*\.\. 500 .* <= 60\.0 <= m"),
        ({"total": math.nan, "n_features": 10, "maximum": 50}, "total=nan"),
        ({"total": 30, "n_features": 10, "maximum": 0.5}, r"maximum=0\.5"),
        ({"total": 30, "n_features": 10, "maximum": math.inf}, "maximum=inf must be finite"),
        ({"total": 30, "n_features": 0, "maximum": 5}, "n_features=0 must be > 0"),
        ({"total": 30, "n_features": 10, "maximum": 5, "minimum": -1.0}, r"minimum=-1\.0"),
        ({"total": 30, "n_features": 10, "maximum": 5, "exponent": -1.0}, r"exponent=-1\.0"),
        ({"total": 30, "n_features": 10, "maximum": 5, "offset": -0.5}, r"offset=-0\.5"),
    ],
)
def test_infeasible_budgets_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        zipf_budgets(**arguments)
    assert "\n" not in str(error.value)


def test_the_numbers_that_the_message_names_do_work():
    for total in (512.0, 5120.0):
        assert float(zipf_budgets(total, 512, maximum=10).sum()) == pytest.approx(total)
    assert float(zipf_budgets(100, 512, maximum=10, minimum=100 / 512).sum()) == pytest.approx(100)
    assert float(zipf_budgets(600, 10, maximum=60.0).sum()) == pytest.approx(600)


def test_a_head_above_the_tokens_of_a_batch_is_capped():
    """Zipf's own law would give the first feature three times as many matches as tokens."""
    tokens = 4096
    ranks = torch.arange(1, N_FEATURES + 1, dtype=torch.float64)
    assert 32 * tokens / (1 / ranks).sum() > 2.9 * tokens
    budgets = zipf_budgets(32 * tokens, N_FEATURES, maximum=tokens, offset=0.0)
    assert (budgets[:3] == tokens).all()
    assert float(budgets.sum()) == pytest.approx(32 * tokens, rel=1e-12)
    assert (budgets[-1000:] == 1).all()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(feasible_budgets(), st.integers(0, 2**63 - 1))
def test_rounding_keeps_the_sum_and_stays_within_one(arguments, seed):
    arguments["maximum"] = max(arguments["maximum"], arguments["minimum"] + 1)
    n_features = arguments["n_features"]
    total = math.ceil(arguments["total"])
    arguments["total"] = total if total <= n_features * arguments["maximum"] else total - 1
    budgets = zipf_budgets(**arguments)
    rounded = round_budgets(budgets, seed)
    assert rounded.dtype == torch.int64
    assert int(rounded.sum()) == arguments["total"]
    assert ((rounded - budgets).abs() < 1).all()
    assert (rounded >= budgets.floor()).all()
    assert torch.equal(rounded, round_budgets(budgets, seed))


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    n_features=st.integers(2, 200),
    k=st.integers(1, 4),
    tokens=st.integers(1, 20),
    minimum=st.floats(0.01, 0.9),
    exponent=st.floats(0, 2),
)
def test_fractional_budgets_are_served_on_average(n_features, k, tokens, minimum, exponent):
    total, rounds = k * tokens, 500
    minimum = min(minimum, total / n_features)
    maximum = max(tokens, total / n_features)
    budgets = zipf_budgets(total, n_features, maximum=maximum, minimum=minimum, exponent=exponent)
    served = torch.stack([round_budgets(budgets, seed) for seed in range(rounds)])
    assert (served.sum(1) == total).all()
    fraction = budgets - budgets.floor()
    error = (fraction * (1 - fraction) / rounds).sqrt()
    difference = served.double().mean(0) - budgets
    # Of 200 fair ones the worst is five standard errors off once in 10,000 times.
    assert (difference.abs() <= 5 * error + 1e-9).all()
    assert (served.sum(0) > 0)[budgets * rounds > 20].all()  # so none of these is dead


def test_rounding_leaves_integers_alone_and_seeds_differ():
    whole = torch.tensor([3.0, 1.0, 0.0, 1.0])
    assert round_budgets(whole, seed=5).tolist() == [3, 1, 0, 1]
    nearly = torch.tensor([3 - 1e-12, 1 + 1e-12], dtype=torch.float64)
    assert {tuple(round_budgets(nearly, seed).tolist()) for seed in range(50)} == {(3, 1)}
    halves = torch.full((10,), 0.5)
    assert len({tuple(round_budgets(halves, seed).tolist()) for seed in range(50)}) > 10


def test_rounding_does_not_touch_the_global_random_state():
    state = torch.get_rng_state()
    round_budgets(torch.full((10,), 0.5), seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "budgets", [[0.5, 0.7], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, 0.00001]]
)
def test_budgets_that_cannot_be_rounded_are_refused(budgets):
    with pytest.raises(ValueError, match="budgets must be >= 0 and sum to a whole number"):
        round_budgets(torch.tensor(budgets), seed=0)
