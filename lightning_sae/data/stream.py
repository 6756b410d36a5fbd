"""Inputs to activations: the endless training stream and the fixed held-out batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.ahead import read_ahead
from lightning_sae.parallel import Ranks
from lightning_sae.parallel.ranks import processes

__all__ = ["ActivationStream", "HeldOutBatch", "HeldOutBatches", "TrainBatch"]

Cursor = tuple[int, int]
"""A place in the stream: a block, and a batch of it."""


class TrainBatch(TypedDict):
    """One rank's share of a training batch: `activations` (tokens, d_model), float32.

    `cursor` is the place right after the batch, where a resumed run goes on.
    """

    activations: Tensor
    cursor: Cursor


class HeldOutBatch(TypedDict):
    """Whole inputs: `activations`, (tokens, d_model) float32, of the kept positions, in order.

    `kept` is the mask of these positions, (inputs, length), and `states` has what was read at all
    positions, (inputs, length, d_model), in the model's dtype. The inputs are there too, under the
    data module's `input_key`: `input_ids`, (contexts, length), `image_numbers`, (images), or
    `run_numbers`, (runs of stored vectors);
    `first` is the number of the first of them among all that are held out.
    """

    activations: Tensor
    kept: Tensor
    states: Tensor
    first: int
    input_ids: NotRequired[Tensor]
    image_numbers: NotRequired[Tensor]
    run_numbers: NotRequired[Tensor]


class _Block(NamedTuple):
    """Inputs to read, which of their positions to keep, and those in the order to train on."""

    number: int
    inputs: Tensor
    kept: Tensor  # (inputs, length)
    order: Tensor  # (tokens)
    expected: bool  # whether a batch of it will be asked for, as far as one knows


@dataclass(frozen=True)
class ActivationStream:
    """Endless shuffled activations: each batch is a function of the seed and its cursor alone.

    A block of inputs is read, while the one before is trained on, its kept tokens are shuffled by
    (seed, block), and cut into batches; what is left below one batch is dropped. Ranks share the
    reading and then the batches, so the tokens of a batch over all ranks, and their order, do not
    depend on the number of ranks.

    Args:
        blocks: Returns the blocks of inputs from the given one on.
        kept: Maps inputs to the mask of positions to train on, (inputs, length).
        read: Maps inputs to their activations, (inputs, length, d_model), on this rank.
        batch_size: Tokens of a batch over all ranks; the number of ranks divides it.
        model_batch_size: Inputs to read at once.
        seed: Seed of the shuffle.
        source: What is read, for error messages.
        start: Returns the cursor to start at; asked at each `iter()`.
        ranks: The processes that share out the tokens of a batch.
        ahead: Whether a thread reads a block while the one before is in use.
        left: Returns how many batches will be asked for from the cursor on; None if nobody knows.
            A block beyond is read only if it is asked for after all.
    """

    blocks: Callable[[int], Iterator[Tensor]]
    kept: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]
    batch_size: int
    model_batch_size: int
    seed: int
    source: str
    start: Callable[[], Cursor]
    ranks: Ranks = field(default_factory=Ranks)
    ahead: bool = True
    left: Callable[[], int | None] = lambda: None

    def __iter__(self) -> Iterator[TrainBatch]:
        """Yield this rank's share of every batch from the cursor on.

        Raises:
            UsageError: If activations are not finite, or a block gives less than one batch, or
                none of its positions counts.
        """
        share = self.batch_size // self.ranks.size
        start, first = self.start()
        blocks = self._blocks(start, first)
        in_turn = ((block, self._read_share(block, Event())) for block in blocks)
        ahead = read_ahead(blocks, self._read_share, lambda block: block.expected)
        for block, mine in ahead if self.ahead else in_turn:
            activations = _gather(mine)[: len(block.inputs)]
            _check_finite(activations, block.kept, f"{self.source}, block {block.number}")
            activations = activations.flatten(0, 1)  # (inputs * length, d_model)
            order = block.order.to(activations.device)
            batches = len(order) // self.batch_size
            for batch in range(first, batches):
                begin = batch * self.batch_size + self.ranks.index * share
                following = (block.number, batch + 1)
                yield {
                    "activations": activations[order[begin : begin + share]].float(),
                    "cursor": following if batch + 1 < batches else (block.number + 1, 0),
                }
            first = 0
            del mine, activations  # before the block after next takes the same memory

    def _blocks(self, start: int, first: int) -> Iterator[_Block]:
        left, passed = self.left(), -first  # batches
        for number, inputs in enumerate(self.blocks(start), start=start):
            kept = self.kept(inputs)
            order = self._order(number, kept)
            yield _Block(number, inputs, kept, order, left is None or passed < left)
            passed += len(order) // self.batch_size

    def _read_share(self, block: _Block, closing: Event) -> Tensor:
        """Read this process's share of a block's model batches, an equal number in each process.

        These are the same for any number of processes, and so the activations, bit for bit.

        Args:
            block: The same in every process.
            closing: Once set, nobody wants the rest.

        Returns:
            Activations, (model batches of a process * model_batch_size, length, d_model).
        """
        process, count = processes()
        parts = block.inputs.split(self.model_batch_size)
        share = math.ceil(len(parts) / count)
        # A process beyond the last part reads that one again: the collective needs equal shapes.
        places = range(process * share, (process + 1) * share)
        states = (self.read(parts[min(place, len(parts) - 1)]) for place in places)
        first = next(states)
        mine = first.new_empty(share * self.model_batch_size, *first.shape[1:])
        for i, part in enumerate(itertools.chain([first], states)):
            mine[i * self.model_batch_size :][: len(part)] = part
            if closing.is_set():
                break
        return mine

    def _order(self, block: int, kept: Tensor) -> Tensor:
        tokens = kept.flatten().nonzero().squeeze(1)
        if not len(tokens):
            raise UsageError(
                f"{self.source}, block {block}: none of its {kept.numel()} positions counts "
                "(`kept` is 0 at all of them), so there is nothing to train on"
            )
        if len(tokens) < self.batch_size:
            raise UsageError(
                f"batch_size={self.batch_size}: block {block} has only {len(tokens)} tokens to "
                "train on; raise batches_per_block"
            )
        shuffle = np.random.default_rng((self.seed, 1, block))
        return tokens[torch.from_numpy(shuffle.permutation(len(tokens)))]


@dataclass(frozen=True)
class HeldOutBatches:
    """Held-out inputs in a fixed order, every rank the same number of batches.

    Args:
        inputs: At least one per rank, (inputs, ...).
        kept: Maps inputs to the mask of positions to measure on, (inputs, length).
        read: Maps inputs to their activations, (inputs, length, d_model), on this rank.
        model_batch_size: Inputs of a batch, or one or a few less.
        source: What is read, for error messages.
        key: Key of the inputs in a batch.
        ranks: The processes that share out the batches.
    """

    inputs: Tensor
    kept: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]
    model_batch_size: int
    source: str
    key: str = "input_ids"
    ranks: Ranks = field(default_factory=Ranks)

    def __len__(self) -> int:
        """Return the number of this rank's batches."""
        ranks, inputs = self.ranks.size, len(self.inputs)
        return min(math.ceil(inputs / (self.model_batch_size * ranks)), inputs // ranks)

    def parts(self) -> Sequence[Tensor]:
        """Return the inputs of the batches of all ranks."""
        return self.inputs.tensor_split(len(self) * self.ranks.size)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """Yield every n-th batch, n the number of ranks.

        Raises:
            UsageError: If activations are not finite, or no position of any input counts.
        """
        if not self.kept(self.inputs).any():
            raise UsageError(
                f"{self.source}: none of their positions counts (`kept` is 0 at all of them), so "
                "there is nothing to measure"
            )
        # Equal numbers of batches, no batch empty: collectives hang when a rank has one less.
        ranks, batches = self.ranks, self.parts()
        firsts = itertools.accumulate((len(inputs) for inputs in batches), initial=0)
        numbered = list(zip(firsts, batches, strict=False))
        for first, inputs in numbered[ranks.index :: ranks.size]:
            activations, kept = self.read(inputs), self.kept(inputs)
            _check_finite(activations, kept, self.source)
            batch = {
                "activations": activations[kept.to(activations.device)].float(),
                self.key: inputs,
                "kept": kept,
                "states": activations,
                "first": first,
            }
            yield cast(HeldOutBatch, batch)  # a type checker cannot know the key


def _check_finite(activations: Tensor, kept: Tensor, where: str) -> None:
    """Raise UsageError if an activation at a kept position is NaN or infinite.

    Args:
        activations: (inputs, length, d_model).
        kept: Mask of the positions that count, (inputs, length).
        where: What was read, for the error message.
    """
    finite = activations.sum(-1, dtype=torch.float32).isfinite()  # NaN and Inf survive the sum
    if not bool((finite | ~kept.to(finite.device)).all()):
        raise UsageError(f"{where}: the activations have NaN or Inf")


def _gather(mine: Tensor) -> Tensor:
    """Return what all processes have read, one after another."""
    _, count = processes()
    if count == 1:
        return mine
    gathered = mine.new_empty(count * len(mine), *mine.shape[1:])
    dist.all_gather(list(gathered.chunk(count)), mine)
    return gathered
