"""How the time of a training step grows with the batch and with the dictionary.

    python -m benchmarks.growth [--rounds 5] [--threads 1]

prints the time of a step in `Trainer.fit` at sizes that double three times, for each architecture,
and the exponents p of time ~ size^p over each doubling and over all of them: 1 is linear, less is
what a part that does not grow leaves (Adam, with the batch). The floor (`training_step`) does not
quite grow linearly either, because small dictionaries fit into a cache. About 10 minutes.
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, ours
from benchmarks.report import floor, ratio, table
from benchmarks.rounds import Contender, Size, interleave

GROWING = {"tokens": Size(512, 384, 6144, 32), "n_features": Size(1024, 384, 3072, 32)}
"""What grows, and the size it grows from."""

FACTORS = (1, 2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps at each size")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as logs:
        options = {"rounds": given.rounds, "threads": given.threads, "device": "cpu"}
        options["logs"] = Path(logs)
        tables = [
            f"{name}, growing {growing}:\n\n{grow(growing, smallest, architecture, options)}"
            for name, architecture in {"Floor": None, **ours.ARCHITECTURES}.items()
            for growing, smallest in GROWING.items()
        ]
    print("\n\n".join(tables))


def grow(growing: str, smallest: Size, architecture: str | None, options: dict[str, Any]) -> str:
    """Return a table of what a step takes, or of the floor, at the sizes that one grows to."""
    sizes = [replace(smallest, **{growing: getattr(smallest, growing) * f}) for f in FACTORS]
    if architecture is None:
        outcome = interleave([Contender(str(s), s, machine.primitives) for s in sizes], **options)
        seconds = [floor(size, outcome, str(size)) for size in sizes]
    else:
        fits = [Contender(str(s), s, ours.fit, {"architecture": architecture}) for s in sizes]
        outcome = interleave(fits, **options)
        seconds = [outcome.seconds(str(size)) for size in sizes]
    doublings = [ratio(larger, smaller) for smaller, larger in itertools.pairwise(seconds)]
    exponents = ["", *(f"{math.log2(doubling):.2f}" for doubling in doublings)]
    rows = [
        [str(size), f"{median(taken) * 1e3:.0f}", exponent]
        for size, taken, exponent in zip(sizes, seconds, exponents, strict=True)
    ]
    overall = math.log(ratio(seconds[-1], seconds[0]), FACTORS[-1])
    return table(["size", "ms", "exponent"], [*rows, ["overall", "", f"{overall:.2f}"]])


if __name__ == "__main__":
    main()
