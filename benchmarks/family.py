"""How long a step takes of the architectures that `training_step` leaves out, beside theirs.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.family FOLDER

writes `family.md` to the folder, in some ten minutes on an idle machine. Everything is as in
`training_step`, which says how: each architecture of ours takes steps in turns with the same one
of SAELens and of dictionary_learning, with Mutual Choice of ours and the machine beside them.

Steps are the first ones, by each library's own initialisation. What a step of theirs takes does not
depend on how many features fire; ours does. JumpReLU and Gated have k matches a token from the
first batch on. Standard begins with half of all features on each token: later steps are shorter.
"""

import argparse
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import machine, ours, peers
from benchmarks.report import MACHINE, milliseconds, processor, ratio, table
from benchmarks.rounds import Contender, Outcome, Size, interleave

SIZE = Size(1024, 384, 6144, 32)
OURS = {
    "jumprelu": ("JumpReLU", "JumpReLUSAE"),
    "gated": ("Gated", "GatedSAE"),
    "standard": ("Standard", "StandardSAE"),
    "matryoshka": ("Matryoshka", "MutualChoiceSAE"),
}
PLAIN = "Mutual Choice"


def contenders(rule: str, size: Size) -> list[Contender]:
    """Return the machine, our plain rule, and an architecture of each library."""
    name, architecture = OURS[rule]
    options = {"prefixes": peers.prefixes(size)} if rule == "matryoshka" else {}
    return [
        Contender(f"{MACHINE}, {name}", size, machine.primitives),
        Contender(f"{PLAIN}, {name}", size, ours.fit, {"architecture": ours.ARCHITECTURES[PLAIN]}),
        Contender(name, size, ours.fit, {"architecture": architecture, "options": options}),
        Contender(f"SAELens {rule}", size, peers.saelens, {"rule": rule}),
        Contender(f"dictionary_learning {rule}", size, peers.dictionary_learning, {"rule": rule}),
    ]


def row(rule: str, size: Size, outcome: Outcome) -> list[str]:
    """Return an architecture's time, and what the others' are of it."""
    name, _ = OURS[rule]
    own = outcome.seconds(name)

    def times(other: str) -> str:
        if other not in outcome.steps:
            return outcome.failures[other]
        return f"{ratio(outcome.seconds(other), own):.1f}"

    return [
        name,
        milliseconds(median(own)),
        f"{ratio(own, outcome.laps(f'{MACHINE}, {name}', 'gemm')):.2f}",
        f"{ratio(own, outcome.seconds(f'{PLAIN}, {name}')):.2f}",
        times(f"SAELens {rule}"),
        times(f"dictionary_learning {rule}"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the table goes")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=Size.parse, default=SIZE, metavar="N,D,F,K")
    given = parser.parse_args(arguments)

    setting = {"rounds": given.rounds, "threads": given.threads, "device": given.device}
    go = functools.partial(interleave, logs=given.folder / "logs", **setting)
    outcomes = {rule: go(contenders(rule, given.size)) for rule in peers.FAMILY}
    measured = functools.reduce(operator.or_, outcomes.values())
    header = ["a step", "ms", "/ encode GEMM", "/ Mutual Choice", "SAELens / ours"]
    rows = [row(rule, given.size, measured) for rule in peers.FAMILY]
    about = f"{processor(given.device)}, {given.size}, medians of {given.rounds} rounds."
    page = f"{about}\n\n{table([*header, 'dictionary_learning / ours'], rows)}\n"
    (given.folder / "family.md").write_text(page)
    print(page, flush=True)


if __name__ == "__main__":
    main()
