"""The weight of a penalty: what it comes to, whatever it begins with."""

import pytest
import torch

from lightning_sae import UsageError
from lightning_sae.core.penalty_weight import PenaltyWeight
from lightning_sae.parallel import Ranks

TOKENS, K = 1000, 8


def matches(weight: float, before: float, right: float) -> float:
    """Those of a run whose optimizer needs some twenty batches for what a weight asks for."""
    return before + 0.05 * (K * (right / weight) ** 0.5 - before)


@pytest.mark.parametrize("right", [0.01, 0.1, 1.0])
def test_it_comes_to_what_gives_k_from_above_and_from_below(right: float):
    controlled = PenaltyWeight(K)
    controlled.begin(torch.tensor(0.1))
    l0 = float(K)
    course = []
    for _ in range(300):
        l0 = matches(controlled.weight.item(), l0, right)
        controlled.observe(torch.tensor(round(TOKENS * l0)), TOKENS, Ranks())
        course.append(l0)
    assert course[-1] == pytest.approx(K, rel=0.05)
    assert controlled.weight.item() == pytest.approx(right, rel=0.1)
    last = course[250:]
    assert max(last) - min(last) < 0.1 * K  # it does not swing


def test_it_answers_at_once_and_remembers_a_little():
    controlled = PenaltyWeight(K)
    controlled.begin(torch.tensor(0.5))
    controlled.observe(torch.tensor(2 * K * TOKENS), TOKENS, Ranks())
    assert controlled.settled.item() == pytest.approx(0.5 * 2**controlled.gain)
    assert controlled.weight.item() == pytest.approx(2 * controlled.settled.item())
    assert controlled(torch.tensor(3.0)).item() == pytest.approx(3 * controlled.weight.item())


def test_no_batch_throws_it_far():
    controlled = PenaltyWeight(K)
    controlled.begin(torch.tensor(1.0))
    controlled.observe(torch.tensor(0), TOKENS, Ranks())
    assert controlled.weight.item() >= 0.09
    before = controlled.weight.item()
    controlled.observe(torch.tensor(0), 0, Ranks())  # no tokens, no news
    assert controlled.weight.item() == before


def test_before_it_begins_there_is_no_penalty():
    controlled = PenaltyWeight(K)
    assert not controlled.begun
    assert controlled(torch.tensor(3.0)) == 0
    controlled.check_state(controlled.state_dict())


@pytest.mark.parametrize("value", [torch.inf, 0.0, -1.0])
def test_weights_that_no_training_leads_to_are_refused(value: float):
    controlled = PenaltyWeight(K)
    controlled.begin(torch.tensor(1.0))
    with pytest.raises(UsageError, match="weight"):
        controlled.check_state(controlled.state_dict() | {"weight": torch.tensor(value)})
