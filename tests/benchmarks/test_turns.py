"""Contenders in one process take turns, and one that fails does not stop the others."""

from pathlib import Path

import torch

from benchmarks.rounds import Contender, Size
from benchmarks.turns import take_turns

SIZE = Size(4, 2, 8, 1)
ROUNDS, STEPS = 3, 2


def take(contenders: list[tuple[Contender, str]], folder: Path):
    return take_turns(
        contenders, [torch.ones(4, 2)], rounds=ROUNDS, steps=STEPS, device="cpu", logs=folder
    )


def test_each_takes_its_steps_while_the_others_wait(tmp_path: Path):
    noted: list[tuple[str, str]] = []

    def note(turns, name):
        for x in turns:
            assert x.shape == (4, 2)
            noted.append((name, torch.get_float32_matmul_precision()))

    before = torch.get_float32_matmul_precision()
    precisions = {"a": "highest", "b": "high"}
    outcome = take(
        [(Contender(n, SIZE, note, {"name": n}), p) for n, p in precisions.items()], tmp_path
    )
    torch.set_float32_matmul_precision(before)
    in_turn = [("a", "b"), ("a", "b"), ("a", "b"), ("b", "a")]  # the first round does not count
    assert noted == [(n, precisions[n]) for turn in in_turn for n in turn for _ in range(STEPS)]
    assert {name: len(steps) for name, steps in outcome.steps.items()} == {"a": ROUNDS, "b": ROUNDS}
    assert not outcome.failures


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path):
    def fail(turns):
        next(turns)
        raise ValueError("no more")

    def go_on(turns):
        for _ in turns:
            pass

    contenders = [Contender("fails", SIZE, fail), Contender("goes on", SIZE, go_on)]
    outcome = take([(contender, "highest") for contender in contenders], tmp_path)
    assert outcome.failures == {"fails": "ValueError: no more"}
    assert list(outcome.steps) == ["goes on"]
    assert len(outcome.steps["goes on"]) == ROUNDS
