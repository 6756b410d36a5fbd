from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_sae.hooks import hooked


def times(factor):
    return lambda _module, _inputs, output: factor * output


def plus(term):
    return lambda _module, _inputs, output: output + term


def seen_by(module):
    """What hooks of others see: one registered before ours."""
    seen = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.item()))
    return seen


def test_they_act_in_the_order_in_which_they_were_entered_and_ahead_of_others():
    module, one = nn.Identity(), torch.ones(())
    seen = seen_by(module)
    with hooked(module, plus(1)):
        with hooked(module, times(3)), hooked(module, plus(10)):
            assert module(one) == 16
        assert module(one) == 2
    assert module(one) == 1
    assert seen == [16, 2, 1]


def test_what_a_module_is_given_is_changed_before_it_runs():
    module, one = nn.Identity(), torch.ones(())
    seen = seen_by(module)
    with (
        hooked(module, lambda _m, inputs: (inputs[0] + 1,), before=True) as calls,
        hooked(module, lambda _m, inputs: (inputs[0] * 3,), before=True),
        hooked(module, plus(10)),
    ):
        assert module(one) == 16
    assert seen == [16]
    assert len(calls) == 1
    assert module(one) == 1
    assert not module._forward_pre_hooks


def test_they_may_be_left_in_any_order():
    module, one = nn.Identity(), torch.ones(())
    first, second, third = (hooked(module, hook) for hook in (plus(1), times(3), plus(10)))
    for each in (first, second, third):
        each.__enter__()
    found = [module(one).item()]
    for each in (second, third, first):
        each.__exit__(None, None, None)
        found.append(module(one).item())
    assert found == [16, 12, 2, 1]
    assert not module._forward_hooks


def test_calls_are_counted_and_those_of_other_threads_are_not_met():
    module, one = nn.Identity(), torch.ones(())
    with ThreadPoolExecutor(1) as pool, hooked(module, plus(1)) as calls:
        assert pool.submit(module, one).result() == 1
        assert not calls
        assert module(one) == 2
        assert len(calls) == 1


def test_none_stays_after_an_error():
    module = nn.Identity()
    with pytest.raises(KeyError), hooked(module, plus(1)):
        raise KeyError
    assert not module._forward_hooks
