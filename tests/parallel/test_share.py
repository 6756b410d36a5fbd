"""Features shared out over two processes, against one that has them all."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel import Share, distribute, local, wide_rows
from lightning_sae.parallel.share import distributed_like, share_features
from tests.helpers.ddp import run_on_two

FEATURES = 5  # three, and two


def all_matches() -> Matches:
    token, feature = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 4, 3, 0])
    return Matches(token, feature, torch.tensor([1.0, 2.0, 3.0, 4.0]), shape=(3, FEATURES))


def use(process: int) -> dict[str, Any]:
    share = share_features(FEATURES, init_device_mesh("cpu", (2,)))
    matches = all_matches()
    own = share.own(matches)
    factor = torch.ones(2, requires_grad=True)
    (same,) = share.fan_out(factor)
    share.sum(same * (process + 1)).sum().backward()
    some, places = share.among(torch.tensor([0, 2, 4]))
    return {
        "here": (share.here.start, share.here.stop, share.features),
        "own": (own.feature.tolist(), own.value.tolist(), own.shape),
        "put": share.put(own.value * 10, matches).tolist(),
        "complete": share.complete(own.value * 10, matches).tolist(),
        "everyones": share.everyones(torch.full((process + 1,), process)).tolist(),
        "gradient": factor.grad.tolist(),
        "among": (some.sizes, places.tolist()),
    }


def test_each_process_has_its_own_and_all_know_the_whole():
    first, second = run_on_two(use)
    assert (first["here"], second["here"]) == ((0, 3, 5), (3, 5, 5))
    assert first["own"] == ([1, 0], [1.0, 4.0], (3, 3))
    assert second["own"] == ([1, 0], [2.0, 3.0], (3, 2))
    assert first["put"] == [10.0, 2.0, 3.0, 40.0]
    assert second["put"] == [1.0, 20.0, 30.0, 4.0]
    assert (first["among"], second["among"]) == (((2, 1), [0, 2]), ((2, 1), [1]))
    for each in (first, second):
        assert each["complete"] == [10.0, 20.0, 30.0, 40.0]
        assert each["everyones"] == [0, 1, 1]
        assert each["gradient"] == [3.0, 3.0]  # of both processes' use of it


def test_alone_everything_is_what_it_was():
    share, matches = Share((FEATURES,)), all_matches()
    rows = torch.ones(2, 3)
    assert share.here == slice(0, FEATURES)
    assert share.own(matches) is matches
    assert share.put(rows, matches) is share.complete(rows, matches) is rows
    assert share.everyones(rows) is share.sum(rows) is share.fan_out(rows)[0] is rows
    some, places = share.among(torch.tensor([1, 3]))
    assert some.sizes == (2,)
    assert places.tolist() == [1, 3]


def keep_own_rows(process: int) -> tuple[Any, ...]:
    share = share_features(FEATURES, init_device_mesh("cpu", (2,)))
    linear = nn.Linear(2, FEATURES)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(10.0).view(FEATURES, 2))
    distribute(linear, share, replicated=frozenset({"bias"}))
    weight = linear.weight
    again = distributed_like(weight, local(weight) * 2)
    whole = again.full_tensor().flatten().tolist()
    (bias,) = wide_rows(linear.bias.bfloat16())
    return isinstance(weight, DTensor), local(weight).tolist(), whole, bias.dtype, len(bias)


def test_parameters_keep_the_rows_of_their_process():
    first, second = run_on_two(keep_own_rows)
    doubled = [2.0 * number for number in range(10)]
    assert first == (True, [[0, 1], [2, 3], [4, 5]], doubled, torch.float32, FEATURES)
    assert second == (True, [[6, 7], [8, 9]], doubled, torch.float32, FEATURES)


def share_one_out(process: int) -> None:
    with pytest.raises(UsageError, match="n_features=1 cannot be shared out over 2 devices"):
        share_features(1, init_device_mesh("cpu", (2,)))


def test_no_process_may_be_without_features():
    run_on_two(share_one_out)
