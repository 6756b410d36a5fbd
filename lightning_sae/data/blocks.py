"""Inputs in order: endless blocks of them to train on, and the first few to hold out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sae.checks import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Inputs",
    "Marks",
    "NumberedInputs",
    "endless_blocks",
    "first_inputs",
    "held_out_parts",
    "of_length",
    "stacked",
]


class NumberedInputs(Protocol):
    """Inputs of a known number: a list of tensors, a tensor, or a map-style `Dataset` of torch.

    Where there is a `__getitems__` too, which maps several numbers to a list of inputs, it is used,
    as torch's `DataLoader` does.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Tensor: ...


Inputs = NumberedInputs | Iterable[Tensor]
"""Tensors of one shape: of a known number, or else any iterable that starts afresh each time.

What has a length is shuffled; what has none is read in its order, from its beginning each epoch.
If that has `state_dict`, which returns the place after the input read last (None: unknown), and
`load_state_dict`, with which the next iteration goes on there, resuming reads nothing before it.
"""

Marks = dict[int, dict[str, Any]]
"""Where blocks begin in inputs without a length, by their numbers; what checkpoints note of it."""


def endless_blocks(
    inputs: Inputs,
    first: int,
    *,
    size: int,
    minimum: int,
    seed: int,
    source: str,
    noun: str,
    marks: Marks | None = None,
) -> Iterator[Tensor]:
    """Yield block `first` and all that follow, epoch after epoch, without end.

    Block b is the inputs [b * size, (b + 1) * size) of the sequence of all epochs. Inputs that have
    a length come each epoch in an order drawn from (seed, epoch). Others come in their own, and to
    skip blocks is to read all that is in them, unless `marks` has where the first one begins.
    Passes are told: 1, 2, 4, 8 ...

    Args:
        inputs: Those of one epoch.
        first: Block to start at.
        size: Inputs of a block.
        minimum: Inputs that an epoch should have.
        seed: Seed of the order.
        source: What is called so in messages: the argument that names the data, and its value.
        noun: What the inputs are called there, in the plural.
        marks: Where blocks begin, as far as that is known; what is found out is added.

    Yields:
        Inputs, (size, ...).

    Raises:
        UsageError: If an epoch has fewer inputs than `minimum`, inputs differ in shape, or they are
            an iterator, of which nothing is left for a second epoch.
    """
    if isinstance(inputs, Iterator):
        raise UsageError(
            f"{source}: {noun} to train on are an iterator, which can be read only once, as what a "
            "function with `yield` returns is: give a list, or an object with __iter__"
        )

    def check_enough(total: int) -> None:
        if total < minimum:
            raise UsageError(
                f"{source} gives only {total} {noun} to train on; one batch needs {minimum}"
            )

    def begin_again(passes: int, total: int) -> None:
        check_enough(total)
        if passes & (passes - 1) == 0:  # few lines, however short the data are: 1, 2, 4, 8, ...
            times = "once" if passes == 1 else f"{passes} times"
            rank_zero_info(
                f"{source}: all {total} {noun} to train on were read {times}; they are read again"
            )

    if hasattr(inputs, "__len__"):
        check_enough(len(cast(NumberedInputs, inputs)))
        blocks = _shuffled(cast(NumberedInputs, inputs), first, size, seed, begin_again)
    else:
        blocks = _in_order(inputs, first, size, begin_again, {} if marks is None else marks)
    return (stacked(block, source, noun) for block in blocks)


def stacked(inputs: Sequence[Tensor], source: str, noun: str) -> Tensor:
    """Return inputs as one tensor, (inputs, ...).

    Args:
        inputs: At least one.
        source: What is called so in the message: the argument that names the data, and its value.
        noun: What the inputs are called there, in the plural.

    Raises:
        UsageError: If they differ in shape.
    """
    shapes = sorted({tuple(each.shape) for each in inputs})
    if len(shapes) > 1:
        raise UsageError(
            f"{source}: {noun} should have one shape, and some have {shapes[0]}, others {shapes[1]}"
        )
    return torch.stack(list(inputs))


def of_length(activations: Tensor, expected: int, noun: str) -> Tensor:
    """Return activations, if inputs have as many positions as the data module says.

    Args:
        activations: What was read of them, (inputs, positions, d_model).
        expected: `positions_per_input`.
        noun: What the inputs are called, in the plural.

    Raises:
        UsageError: If they have more or fewer.
    """
    found = activations.shape[1]
    if found != expected:
        raise UsageError(
            f"positions_per_input={expected}: the model reads {found} positions of the {noun}"
        )
    return activations


def held_out_parts(
    inputs: Inputs, *, validation: int, test: int, source: str, noun: str
) -> dict[str, list[Tensor]]:
    """Share out held-out inputs, asking for no more than are needed; say so if they are too few.

    Args:
        inputs: Those that are never trained on.
        validation: How many to validate on: the first ones.
        test: How many to test on: those that follow.
        source: What is called so in the message: the argument that names the data, and its value.
        noun: What the inputs are called there, in the plural.

    Returns:
        The inputs of "validation" and "test".
    """
    first = first_inputs(inputs, validation + test)
    parts = {"validation": first[:validation], "test": first[validation:]}
    if len(first) < validation + test:
        rank_zero_info(
            f"{source} has {len(first)} held-out {noun}: "
            f"{len(parts['validation'])} of {validation} to validate on, "
            f"{len(parts['test'])} of {test} to test on"
        )
    return parts


def first_inputs(inputs: Inputs, count: int) -> list[Tensor]:
    """Return the first so many inputs, or all if there are fewer; no others are read."""
    if hasattr(inputs, "__len__"):
        numbered = cast(NumberedInputs, inputs)
        return [numbered[number] for number in range(min(count, len(numbered)))]
    return list(itertools.islice(inputs, count))


def _shuffled(
    inputs: NumberedInputs,
    first: int,
    size: int,
    seed: int,
    begin_again: Callable[[int, int], None],
) -> Iterator[Sequence[Tensor]]:
    total = len(inputs)
    several = getattr(inputs, "__getitems__", None)

    @functools.lru_cache(maxsize=2)  # a block may straddle two epochs
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((seed, 0, epoch)).permutation(total)

    for block in itertools.count(first):
        epochs, places = np.divmod(np.arange(block * size, (block + 1) * size), total)
        for epoch in np.unique(epochs[places == 0]).tolist():
            if epoch > 0:
                begin_again(epoch, total)
        rows = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        numbers = np.concatenate(rows).tolist()
        yield several(numbers) if several else [inputs[number] for number in numbers]


def _in_order(
    inputs: Iterable[Tensor],
    first: int,
    size: int,
    begin_again: Callable[[int, int], None],
    marks: Marks,
) -> Iterator[Sequence[Tensor]]:
    stateful: Any = inputs if hasattr(inputs, "load_state_dict") else None
    mark = marks.get(first) if stateful else None
    passes, read = (mark["passes"], mark["read"]) if mark else (1, 0)  # of a pass that began before
    if mark:
        stateful.load_state_dict(mark["inputs"])

    def endless() -> Iterator[Tensor]:
        nonlocal passes, read
        while True:
            for each in inputs:
                read += 1
                yield each
            begin_again(passes, read)
            passes, read = passes + 1, 0

    rest = itertools.islice(endless(), 0 if mark else first * size, None)
    for number in itertools.count(first):
        block = list(itertools.islice(rest, size))
        if stateful and (state := stateful.state_dict()) is not None:
            marks[number + 1] = {"passes": passes, "read": read, "inputs": state}
            marks.pop(number - 3, None)  # nobody is further behind: one block is read ahead
        yield block
