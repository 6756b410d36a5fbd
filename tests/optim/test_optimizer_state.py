"""An optimizer takes no state that it could not have made of its parameters."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sae import ChunkedAdam
from lightning_sae.checks import UsageError
from lightning_sae.optim.optimizer_state import require_state_of

KINDS: dict[str, Callable[..., Optimizer]] = {
    **{
        name: getattr(torch.optim, name)
        for name in [
            *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "LBFGS"),
            *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
        ]
    },
    "Adam, fused": partial(torch.optim.Adam, fused=True),
    "Adam, amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
    "ChunkedAdam": ChunkedAdam,
}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"encoder.weight": (6, 4), "encoder.bias": (6,), "one": (1, 1)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def stepped(make: Callable[..., Optimizer], steps: int = 2) -> dict[str, Any]:
    own = parameters().values()
    optimizer = make(own)
    for _ in range(steps):
        for parameter in own:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(lambda: 1.0)
    return copy.deepcopy(optimizer.state_dict())


def check(make: Callable[..., Optimizer], state: dict[str, Any], begun: bool = True) -> None:
    own = parameters()
    optimizer = make(own.values())
    names = {parameter: name for name, parameter in own.items()}
    before = copy.deepcopy(optimizer.state_dict())
    require_state_of(optimizer, state, names, begun=begun)
    assert str(optimizer.state_dict()) == str(before)  # it has made no step itself


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_its_own_state_is_taken(name: str, steps: int):
    check(KINDS[name], stepped(KINDS[name], steps), begun=steps > 0)


def test_a_frozen_parameter_needs_none():
    state = stepped(torch.optim.Adam)
    del state["state"][1]
    own = parameters()
    own["encoder.bias"].requires_grad = False
    require_state_of(torch.optim.Adam(own.values()), state, {}, begun=True)


ADAM = "optimizer=Adam: of encoder.weight "


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda of: of[0].update(exp_avg=torch.zeros(3, 3)),
            ADAM + "the checkpoint has exp_avg of shape (3, 3), not (6, 4)",
        ),
        (
            lambda of: of[0].update(exp_avg_sq=torch.zeros(1)),
            ADAM + "the checkpoint has exp_avg_sq of shape (1,), not (6, 4)",
        ),
        (
            lambda of: of[0].update(exp_avg=torch.zeros(4, 6)),
            ADAM + "the checkpoint has exp_avg of shape (4, 6), not (6, 4)",
        ),
        (
            lambda of: of[0].update(exp_avg=0.0),
            ADAM + "the checkpoint has exp_avg of shape 0.0, not (6, 4)",
        ),
        (
            lambda of: of[0].update(step=torch.zeros(6, 4)),
            ADAM + "the checkpoint has step of shape (6, 4), not ()",
        ),
        (
            lambda of: of[0].update(step=torch.tensor(-3.0)),
            "step of encoder.weight=-3 in the state to load must be at least 0",
        ),
        (
            lambda of: of[0]["exp_avg"][1, 1].fill_(torch.nan),
            "exp_avg of encoder.weight has NaN or Inf in the state to load",
        ),
        (
            lambda of: of[0].pop("exp_avg_sq"),
            ADAM + "it keeps exp_avg and exp_avg_sq and step, and the checkpoint has "
            "exp_avg and step",
        ),
        (
            lambda of: of.pop(0),
            ADAM + "it keeps exp_avg and exp_avg_sq and step, and the checkpoint has nothing",
        ),
        (
            lambda of: of.clear(),
            ADAM + "it keeps exp_avg and exp_avg_sq and step, and the checkpoint has nothing",
        ),
        (
            lambda of: of.update({7: of[0]}),
            "optimizer=Adam has no parameter for state 7 of the checkpoint's",
        ),
    ],
)
def test_what_does_not_fit_is_told(change: Callable, told: str):
    state = stepped(torch.optim.Adam)
    change(state["state"])
    with pytest.raises(UsageError) as caught:
        check(torch.optim.Adam, state)
    assert str(caught.value) == told


def test_the_largest_of_all_moments_is_looked_at_too():
    make = KINDS["Adam, amsgrad"]
    state = stepped(make)
    state["state"][0]["max_exp_avg_sq"] = torch.zeros(6)
    with pytest.raises(UsageError, match=r"max_exp_avg_sq of shape \(6,\), not \(6, 4\)"):
        check(make, state)


def test_factors_of_moments_are_looked_at_too():
    state = stepped(torch.optim.Adafactor)
    state["state"][0]["row_var"] = torch.zeros(4, 1)
    with pytest.raises(UsageError, match=r"row_var of shape \(4, 1\), not \(6, 1\)"):
        check(torch.optim.Adafactor, state)


@pytest.mark.parametrize("name", ["SGD", "SGD with momentum", "Adam, amsgrad", "Adagrad"])
def test_the_state_of_another_optimizer_is_told(name: str):
    with pytest.raises(UsageError, match=r"of encoder.weight it keeps .*, and the checkpoint has"):
        check(KINDS[name], stepped(torch.optim.Adam))


def test_another_number_of_parameters_is_told():
    state = stepped(torch.optim.Adam)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(UsageError, match=r"has groups of \[3\] parameters, and in the .* \[2\]"):
        check(torch.optim.Adam, state)


class Leaning(torch.optim.Optimizer):
    """Someone's optimizer, of which torch copies less than it needs."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.own = list(self.param_groups[0]["params"])

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for parameter in self.own:
            self.state[parameter]["mean"] = torch.zeros(3)


def test_an_optimizer_that_cannot_be_copied_is_left_alone():
    check(Leaning, stepped(Leaning))


class Lazy(torch.optim.Optimizer):
    """Someone's optimizer, which keeps other things of small parameters than of large ones."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["mean"] = torch.zeros_like(parameter)
            if parameter.numel() > 8:
                self.state[parameter]["scale"] = torch.ones(2)


def test_an_optimizer_of_someone_else_may_keep_what_it_likes():
    state = stepped(Lazy)
    check(Lazy, state)
    state["state"][0]["mean"] = torch.zeros(2, 2)
    with pytest.raises(UsageError, match=r"mean of shape \(2, 2\), not \(6, 4\)"):
        check(Lazy, state)
