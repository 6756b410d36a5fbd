import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.data.blocks import endless_blocks, held_out_parts

LENGTH = 4


def numbered(total):
    """Inputs that hold nothing but their number."""
    return [torch.full((LENGTH,), number) for number in range(total)]


@dataclass
class OnceAPass:
    """Inputs without a length, and how often they were begun."""

    total: int
    passes: list[int] = field(default_factory=list)

    def __iter__(self):
        self.passes.append(0)
        yield from numbered(self.total)


class Resumed(OnceAPass):
    """Such inputs that know where they are, and count those that were read."""

    def __init__(self, total):
        super().__init__(total)
        self.begin, self.reached, self.read = 0, None, 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for number in range(begin, self.total):
            self.reached, self.read = number + 1, self.read + 1
            yield torch.full((LENGTH,), number)

    def state_dict(self):
        return self.reached

    def load_state_dict(self, state):
        self.begin = state


class Several(list):
    """A list that is asked for several at once."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.asked = []

    def __getitem__(self, number):
        raise AssertionError("they should be asked for at once")

    def __getitems__(self, numbers):
        self.asked.append(numbers)
        return [torch.full((LENGTH,), number) for number in numbers]


def blocks(inputs, size, first=0, count=1, *, minimum=1, seed=0, marks=None):
    arguments = {"size": size, "minimum": minimum, "seed": seed, "marks": marks}
    endless = endless_blocks(inputs, first, **arguments, source="text='a.txt'", noun="contexts")
    return list(itertools.islice(endless, count))


def numbers(inputs, size, first=0, count=1, **changed):
    return torch.cat(blocks(inputs, size, first, count, **changed))[:, 0].tolist()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(total=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 3))
def test_epochs_follow_each_other_and_each_is_a_permutation(total, size, seed):
    found = blocks(numbered(total), size, 0, 8, seed=seed)
    assert all(block.shape == (size, LENGTH) and block.dtype == torch.int64 for block in found)
    order = torch.cat(found)[:, 0].tolist()
    for epoch in range(len(order) // total):
        assert sorted(order[epoch * total :][:total]) == list(range(total))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(total=st.integers(1, 12), size=st.integers(1, 15), first=st.integers(0, 6))
@pytest.mark.parametrize("of", [numbered, OnceAPass])
def test_starting_late_skips_and_changes_nothing(of, total, size, first):
    expected = blocks(of(total), size, 0, first + 2)[first:]
    assert all(map(torch.equal, blocks(of(total), size, first, 2), expected))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(total=st.integers(1, 12), size=st.integers(1, 15), first=st.integers(1, 6))
def test_what_knows_where_it_is_reads_nothing_before(total, size, first):
    marks = {}
    blocks(Resumed(total), size, 0, first, marks=marks)
    inputs, expected = Resumed(total), blocks(OnceAPass(total), size, 0, first + 3)[first:]
    assert all(map(torch.equal, blocks(inputs, size, first, 3, marks=marks), expected))
    assert inputs.read == 3 * size
    assert all(map(torch.equal, blocks(inputs, size, first, 3), expected))  # without a mark


def test_a_pass_that_was_resumed_is_told_as_one(caplog):
    marks = {}
    blocks(Resumed(5), 4, 0, 2, marks=marks)  # 3 of the second pass
    assert set(marks) == {1, 2}
    caplog.clear()
    with caplog.at_level("INFO"):
        blocks(Resumed(5), 4, 2, 1, marks=marks)
    line = "text='a.txt': all 5 contexts to train on were read 2 times; they are read again"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_few_marks_are_remembered():
    marks = {}
    blocks(Resumed(5), 4, 0, 50, marks=marks)
    assert set(marks) == {47, 48, 49, 50}


def test_orders_differ_by_epoch_and_by_seed():
    first, second = (block[:, 0].tolist() for block in blocks(numbered(20), 20, 0, 2))
    assert first != second
    assert first != list(range(20))
    assert first != numbers(numbered(20), 20, seed=1)
    assert first == numbers(numbered(20), 20)


def test_a_tensor_a_list_and_what_is_asked_at_once_are_the_same():
    rows = numbered(7)
    several = Several(rows)
    expected = numbers(rows, 5, count=3)
    assert numbers(torch.stack(rows), 5, count=3) == expected
    assert numbers(several, 5, count=3) == expected
    assert list(map(len, several.asked)) == [5, 5, 5]
    assert blocks(torch.arange(7), 5, count=3)[2].tolist() == expected[10:]  # no dimension each


def test_what_has_no_length_repeats_in_its_order():
    inputs = OnceAPass(5)
    assert numbers(inputs, 4, count=4) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert len(inputs.passes) == 4


@pytest.mark.parametrize("of", [numbered, OnceAPass])
@pytest.mark.parametrize("size", [3, 4, 25])
def test_what_is_read_again_is_told_ever_more_rarely(of, size, caplog):
    def told(first, count):
        caplog.clear()
        with caplog.at_level("INFO"):
            blocks(of(5), size, first, count)
        return [record.getMessage() for record in caplog.records]

    line = "text='a.txt': all 5 contexts to train on were read {}; they are read again"
    times = ["once", "2 times", "4 times", "8 times"]
    assert told(0, 5 // size) == []
    assert told(0, 51 // size + 1) == [line.format(each) for each in times]


@pytest.mark.parametrize("of", [numbered, OnceAPass])
@pytest.mark.parametrize("total", [0, 3])
def test_too_few_inputs(of, total):
    message = rf"^text='a.txt' gives only {total} contexts to train on; one batch needs 4$"
    with pytest.raises(ValueError, match=message):
        blocks(of(total), 2, count=10, minimum=4)
    assert len(blocks(of(4), 2, count=10, minimum=4)) == 10


def test_an_iterator_that_cannot_start_afresh_is_told():
    for inputs in (iter(numbered(50)), (each for each in numbered(50))):
        with pytest.raises(ValueError, match="contexts to train on are an iterator"):
            blocks(inputs, 2, count=1)  # not in a second epoch, which may be hours away


@pytest.mark.parametrize("of", [numbered, OnceAPass])
@pytest.mark.parametrize(("validation", "test"), [(2, 3), (4, 0), (2, 9), (9, 2)])
def test_held_out_inputs_are_the_first_ones(of, validation, test, caplog):
    with caplog.at_level("INFO"):
        parts = held_out_parts(
            of(6), validation=validation, test=test, source="text='a.txt'", noun="contexts"
        )
    found = {stage: [int(each[0]) for each in part] for stage, part in parts.items()}
    in_order = list(range(6))
    expected = {"validation": in_order[:validation], "test": in_order[validation:][:test]}
    assert found == expected
    counts = [len(part) for part in expected.values()]
    message = (
        f"text='a.txt' has 6 held-out contexts: {counts[0]} of {validation} to "
        f"validate on, {counts[1]} of {test} to test on"
    )
    said = [record.getMessage() for record in caplog.records]
    assert said == ([message] if validation + test > 6 else [])


def test_no_more_held_out_inputs_are_asked_for_than_needed():
    def until_three():
        yield from numbered(3)
        raise AssertionError("a fourth was asked for")

    parts = held_out_parts(until_three(), validation=1, test=2, source="", noun="")
    assert [len(part) for part in parts.values()] == [1, 2]
