"""How long a training step takes: ours, and those of other libraries.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.training_step FOLDER

writes `training_step.md`, `.json` and `.png` to the folder, in about 20 minutes on an idle machine
with 24 GB; `--quick` shows in two that everything runs. A library that is not
installed is left out, and the table says so.

Every contender runs its own training loop in a process of its own: ours in `Trainer.fit`, set up as
in the shipped configurations (clipping, TensorBoard, schedule) with a fused Adam; SAELens in
`SAETrainer.fit`; dictionary_learning in `trainSAE`; sparsify in `Trainer.fit`, on a "language
model" that hands out activations. They take steps in turns, in an order that rotates, and ratios
are medians over rounds. Times are CPU time with one thread, else wall time; with `--device cuda`
they are wall time until the GPU is done, and float32 products are TF32 for everyone. Auxiliary
losses are off: `--aux` measures them instead.

The floor is what a step cannot do without: the encoder's matrix product, a fused Adam over all
weights, and four rows of d_model floats read for each match (decoder, gradient of the codes, two
gradients of weights) at the speed of a copy, read and written bytes together. All three are
measured here, in the same rounds. Rows that are still in a cache can beat it.

The peers bring torchvision, which may break imports: `benchmarks/requirements.txt` says how to do
without.
"""

import argparse
import functools
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, ours, peers, report
from benchmarks.rounds import Contender, Outcome, Size, interleave

SIZES = [
    Size(1024, 384, 6144, 32),
    Size(4096, 384, 6144, 64),
    Size(1024, 768, 24576, 32),
    Size(4096, 768, 24576, 64),
]
QUICK = [Size(256, 64, 512, 8)]
DEAD = 0.3
"""Share of features taken for dead with `--aux`."""
EVERY = 8
"""With `--aux`, ours also have the loss on one token in so many."""


def contenders(size: Size) -> list[Contender]:
    """Return our training steps, then the peers'."""
    train = {
        **{name: (ours.fit, {"architecture": a}) for name, a in ours.ARCHITECTURES.items()},
        **{
            f"{name}, ChunkedAdam": (ours.fit, {"architecture": a, "chunked": True})
            for name, a in ours.ARCHITECTURES.items()
        },
        **{f"SAELens {rule}": (peers.saelens, {"rule": rule}) for rule in peers.RULES},
        **{
            f"dictionary_learning {rule}": (peers.dictionary_learning, {"rule": rule})
            for rule in peers.RULES
        },
        **{f"sparsify topk, {o}": (peers.sparsify, {"optimizer": o}) for o in ("signum", "adam")},
    }
    return [Contender(name, size, f, options) for name, (f, options) in train.items()]


def at_once(size: Size) -> list[Contender]:
    """Return what is compared round by round: the machine, our steps and the peers'."""
    return [Contender(report.MACHINE, size, machine.primitives), *contenders(size)]


def without_trainer(size: Size) -> list[list[Contender]]:
    """Return pairs: a training step of ours in `Trainer.fit`, and in a plain loop."""
    return [
        [
            Contender(name + report.FIT, size, ours.fit, {"architecture": architecture}),
            Contender(name + report.LOOP, size, ours.loop, {"architecture": architecture}),
        ]
        for name, architecture in ours.ARCHITECTURES.items()
    ]


def with_aux(size: Size) -> list[list[Contender]]:
    """Return pairs: a training step without an auxiliary loss, and with one."""
    everyone = contenders(size)
    everyone += [
        replace(
            each,
            name=f"{each.name}, aux_every={EVERY}",
            options=each.options | {"aux_every": EVERY},
        )
        for each in everyone
        if report.is_ours(each.name)
    ]
    return [
        [each, replace(each, name=each.name + report.AUX, options=each.options | {"dead": DEAD})]
        for each in everyone
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the report goes")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--sizes", type=Size.parse, nargs="+", metavar="N,D,F,K", help="instead of the usual ones"
    )
    parser.add_argument("--aux", action="store_true", help="measure the auxiliary losses instead")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    given = parser.parse_args(arguments)

    setting = {"rounds": given.rounds, "threads": given.threads, "device": given.device}
    go = functools.partial(interleave, logs=given.folder / "logs", **setting)
    sizes = given.sizes or (QUICK if given.quick else SIZES[2:3] if given.aux else SIZES)
    measured: dict[Size, Outcome] = {}
    for size in sizes:
        print(size, flush=True)
        # Pairs one by one: all at once would need much more memory.
        groups = with_aux(size) if given.aux else [at_once(size), *without_trainer(size)]
        measured[size] = functools.reduce(operator.or_, map(go, groups))
        # After each size, so that a run that is cut short leaves what it has measured.
        report.write(given.folder, measured, **setting)
    print(f"see {given.folder}", flush=True)


if __name__ == "__main__":
    main()
