"""Copies on the host: never stale, and made anew only once what they are of has changed."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sae import host_copy
from lightning_sae.host_copy import HostCopy, true_places


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(1))
        self.host = HostCopy()
        self.made = 0

    def read(self) -> int:
        def make() -> Tensor:
            self.made += 1
            return self.count * 10

        return int(self.host.read(make, self.count))


def load(counter: Counter, **options: bool) -> None:
    counter.load_state_dict({"count": torch.tensor(3)}, **options)


@torch.inference_mode()
def fill(counter: Counter) -> None:
    counter.count.fill_(3)


CHANGES: dict[str, Callable[[Counter], None]] = {
    "in place": lambda counter: counter.count.add_(2),
    "by indexing": lambda counter: counter.count.view(1).__setitem__(0, 3),
    "in inference mode": fill,
    "another tensor": lambda counter: setattr(counter, "count", torch.tensor(3)),
    "a state that is loaded": load,
    "a state that is assigned": lambda counter: load(counter, assign=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Counter], None]):
    counter = Counter()
    assert [counter.read(), counter.read(), counter.made] == [10, 10, 1]
    change(counter)
    assert [counter.read(), counter.read(), counter.made] == [30, 30, 2]


def test_what_was_sent_is_read():
    counter = Counter()
    counter.count.add_(1)
    counter.host.send(counter.count * 10, counter.count)
    assert [counter.read(), counter.made] == [20, 0]


def test_a_copy_does_not_follow_what_it_is_of():
    count, host = torch.tensor(1), HostCopy()
    before = host.of(count)
    count.add_(1)
    assert [before.item(), host.of(count).item()] == [1, 2]


def test_numbers_are_sources_too():
    count, host = torch.tensor(1), HostCopy()
    found = [host.read(lambda k=k: count * k, count, k).item() for k in (2, 2.5, 2)]
    assert found == [2, 2.5, 2]


def test_tensors_of_inference_mode_are_read_each_time():
    with torch.inference_mode():
        count, host = torch.tensor(1), HostCopy()
        found = [host.of(count).item()]
        count.add_(1)
        found.append(host.of(count).item())
    assert found == [1, 2]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])  # noqa: S301 - ours
def test_copies_of_a_copy_begin_afresh(again: Callable[[Counter], Counter]):
    counter = Counter()
    counter.read()
    other = again(counter)
    other.count.add_(1)
    assert [other.read(), counter.read()] == [20, 10]


@settings(deadline=None, derandomize=True)
@given(mask=st.lists(st.booleans(), max_size=40), device=st.booleans())
def test_places_of_a_mask(mask: list[bool], device: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "_is_host", lambda tensor: not device)
        found = true_places(torch.tensor(mask, dtype=torch.bool), sum(mask))
    assert found.dtype == torch.int64
    assert found.tolist() == [place for place, value in enumerate(mask) if value]
