"""The law of budgets: given, fitted, or guessed where nothing can be fitted."""

import pytest
import torch

from lightning_sae.architectures.budget_law import budget_law
from lightning_sae.core import FiringHistory
from lightning_sae.zipf import fit_zipf


def history(density: torch.Tensor) -> FiringHistory:
    found = FiringHistory(len(density), dead_after_tokens=1_000_000)
    found.density.copy_(density)
    found.tokens_seen.fill_(1_000_000)
    return found


LAW = 0.4 / (torch.arange(200) + 3.0) ** 1.1


def test_what_is_given_is_taken_and_the_rest_is_fitted():
    measured = history(LAW)
    fit = fit_zipf(measured.density, 1_000_000)
    assert fit.exponent == pytest.approx(1.1, rel=0.02)
    assert budget_law(measured, None, None) == (fit.exponent, fit.offset)
    assert budget_law(measured, 0.7, None) == (0.7, fit.offset)
    assert budget_law(measured, None, 0.0) == (fit.exponent, 0.0)
    assert budget_law(measured, 0.0, 5.0) == (0.0, 5.0)


def test_before_anything_is_measured_it_is_a_guess():
    assert budget_law(history(torch.zeros(200)), None, None) == (1.0, 0.2)


def test_densities_that_follow_no_law_are_warned_of():
    density = torch.zeros(24)
    density[:3] = 0.5
    with pytest.warns(UserWarning, match="Budgets follow s=1.0, q=0.024: a Zipf fit needs 10"):
        assert budget_law(history(density), None, None) == (1.0, 0.024)
