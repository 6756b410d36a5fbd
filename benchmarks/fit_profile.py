"""Where the time of `lightning_sae fit` goes: the language model, the SAE's steps, or elsewhere.

    python -m benchmarks.fit_profile

runs 160 steps of `mutual_choice.yaml` in a folder that is then removed, and prints a table; further
arguments go to `lightning_sae fit`. Wall time, by Lightning's profiler and a timer around the
forward pass of the language model, which a thread of its own runs while the SAE trains. Training
waits for it where it takes longer than that. What comes before training takes the same time however
many steps there are.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from unittest.mock import patch

from benchmarks.report import table

FIT = ["fit", "--config", "mutual_choice.yaml", "--trainer.profiler", "simple"]
STEPS = ["--trainer.max_steps", "160"]
LOOP, STEP = "run_training_epoch", "run_training_batch"
HOOKS = ("prepare_data", "train_dataloader", "val_dataloader")


def main(arguments: Sequence[str]) -> None:
    """Run `fit` and print the table."""
    begin = time.perf_counter()
    from lightning.pytorch.profilers import SimpleProfiler

    from lightning_sae import ResidualStream, cli
    from lightning_sae.data import stream

    imports = time.perf_counter() - begin
    read, start = ResidualStream.read, SimpleProfiler.start
    read_ahead = stream.read_ahead
    reading: list[float] = []
    waiting: list[float] = []
    before_loop: list[float] = []

    def timed_read(*args, **kwargs):
        began = time.perf_counter()
        activations = read(*args, **kwargs)
        reading.append(time.perf_counter() - began)
        return activations

    def timed_ahead(*args):
        blocks = read_ahead(*args)
        while True:
            began = time.perf_counter()
            block = next(blocks)
            waiting.append(time.perf_counter() - began)
            yield block

    def noted_start(profiler: SimpleProfiler, action: str) -> None:
        if action == LOOP:
            before_loop.extend(waiting)  # for the first block
        start(profiler, action)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        patch.object(ResidualStream, "read", timed_read),
        patch.object(stream, "read_ahead", timed_ahead),
        patch.object(SimpleProfiler, "start", noted_start),
        patch.object(SimpleProfiler, "describe", autospec=True) as describe,  # prints a long table
    ):
        cli.main([*FIT, *STEPS, *arguments])
    whole = time.perf_counter() - begin
    durations = describe.call_args.args[0].recorded_durations

    def taken(action: str) -> float:
        return sum(sum(durations[name]) for name in durations if name.endswith(action))

    training = taken(LOOP) + sum(before_loop)
    inside = {"waiting for activations": sum(waiting), "SAE's steps": taken(STEP)}
    inside["rest of training"] = training - sum(inside.values())
    outside = {"imports": imports, **{hook: taken(f".{hook}") for hook in HOOKS}}
    outside["rest"] = whole - training - sum(outside.values())
    rows = [
        [part, f"{s:.1f}", f"{s / whole:.0%}", f"{s / training:.0%}"] for part, s in inside.items()
    ]
    rows += [[part, f"{s:.1f}", f"{s / whole:.0%}", ""] for part, s in outside.items()]
    rows.append(["all", f"{whole:.1f}", "100%", f"{training:.1f} s"])
    rows += [["language model, in its thread", f"{sum(reading):.1f}", "", ""]]
    print(table(["", "seconds", "of all", "of training"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
