"""Reading ahead: what is read, by whom, and when it ends."""

import threading

import pytest
import torch
from torch import Tensor

from lightning_sae.data.ahead import read_ahead


def tens(item: int, closing: threading.Event) -> Tensor:
    return torch.tensor(10 * item)


def thread_is_there() -> bool:
    return any(thread.name.startswith("read_ahead") for thread in threading.enumerate())


def test_everything_comes_in_order():
    found = [(item, int(read)) for item, read in read_ahead(iter(range(5)), tens)]
    assert found == [(i, 10 * i) for i in range(5)]
    assert not list(read_ahead(iter(()), tens))
    assert not thread_is_there()


def test_the_next_one_is_read_while_this_one_is_in_use_but_not_the_one_after():
    begun = [threading.Event() for _ in range(4)]

    def read(item: int, closing: threading.Event) -> Tensor:
        begun[item].set()
        return tens(item, closing)

    asked: list[int] = []
    items = (asked.append(i) or i for i in range(4))
    ahead = read_ahead(items, read)
    assert not asked
    next(ahead)
    assert begun[1].wait(10)
    assert asked == [0, 1]
    assert not begun[2].is_set()
    ahead.close()


def test_the_caller_reads_what_it_waits_for_and_a_thread_the_rest():
    readers: list[str] = []

    def read(item: int, closing: threading.Event) -> Tensor:
        readers.append(threading.current_thread().name)
        return tens(item, closing)

    assert len(list(read_ahead(iter(range(3)), read))) == 3
    assert readers[0] == threading.current_thread().name
    assert all(name.startswith("read_ahead") for name in readers[1:])


def test_what_is_not_expected_is_read_by_the_caller_if_it_is_asked_for():
    readers: dict[int, str] = {}

    def read(item: int, closing: threading.Event) -> Tensor:
        readers[item] = threading.current_thread().name
        return tens(item, closing)

    ahead = read_ahead(iter(range(4)), read, expected=lambda item: item < 2)
    assert [int(next(ahead)[1]) for _ in range(2)] == [0, 10]
    assert list(readers) == [0, 1]
    assert [int(tensor) for _, tensor in ahead] == [20, 30]
    assert readers[1] != readers[0] == readers[2] == readers[3]


def test_a_mistake_is_told_when_its_turn_comes():
    def items():
        yield 0
        yield 1
        raise OSError("there are no more")

    ahead = read_ahead(items(), tens)
    assert [next(ahead)[0], next(ahead)[0]] == [0, 1]
    with pytest.raises(OSError, match="there are no more"):
        next(ahead)

    def read(item: int, closing: threading.Event) -> Tensor:
        return torch.tensor(1 // (1 - item))

    ahead = read_ahead(iter(range(3)), read)
    next(ahead)
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    assert not thread_is_there()


def test_reading_ends_when_nobody_wants_it():
    begun = threading.Event()

    def read(item: int, closing: threading.Event) -> Tensor:
        if item:
            begun.set()
            assert closing.wait(60)
        return tens(item, closing)

    ahead = read_ahead(iter(range(3)), read)
    next(ahead)
    assert begun.wait(10)
    assert thread_is_there()
    del ahead  # as the Trainer does when it has all its steps
    assert not thread_is_there()


def test_as_many_threads_read_as_the_caller_has():
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ahead = read_ahead(iter([0]), lambda *_: torch.tensor(torch.get_num_threads()))
            assert int(next(ahead)[1]) == count
    finally:
        torch.set_num_threads(before)
