"""Tables, a figure and the raw figures of what was measured."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from benchmarks.machine import COPIED
from benchmarks.ours import ARCHITECTURES, CLIP
from benchmarks.rounds import Outcome, Size

MACHINE = "the machine"
FIT, LOOP, AUX = ", in fit", ", in a loop", ", with auxiliary loss"
CLIPS_AT = {"SAELens": "1.0", "dictionary_learning": "1.0", "sparsify": "never"}
"""Norm at which the peers clip gradients, by the first word of a contender's name."""
PACKAGES = ("torch", "lightning", "sae-lens", "dictionary-learning", "eai-sparsify")
FLOAT = 4  # bytes


def write(
    folder: Path, measured: dict[Size, Outcome], *, rounds: int, threads: int, device: str
) -> None:
    """Write what was measured as a page, as JSON and, where there is a floor, as a figure."""
    versions = {name: version_of(name) for name in PACKAGES}
    load = os.getloadavg()[0]
    page = [
        f"{processor(device)}, {os.cpu_count()} cores, {threads} thread(s) in use, {rounds} "
        f"rounds, {'CPU' if threads == 1 and device == 'cpu' else 'wall'} time, load average "
        f"{load:.1f} at the end. "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}."
    ]
    for size, outcome in measured.items():
        page += [f"## {size}", *tables(size, outcome)]
        page += [f"{name} could not be run: {reason}" for name, reason in outcome.failures.items()]
    (folder / "training_step.md").write_text("\n\n".join(page) + "\n")

    about = {"processor": processor(device), "threads": threads, "rounds": rounds, "load": load}
    raw = {str(size): asdict(outcome) for size, outcome in measured.items()}
    text = json.dumps(about | {"versions": versions, "measured": raw}, indent=1)
    (folder / "training_step.json").write_text(text)

    drawn = {size: outcome for size, outcome in measured.items() if MACHINE in outcome.steps}
    if drawn:
        draw(drawn, folder / "training_step.png")


def floor(size: Size, outcome: Outcome, name: str = MACHINE) -> list[float]:
    """Return, for each round, the seconds that no step can do without."""
    read = 4 * size.k * size.tokens * size.d_model * FLOAT
    moved = 2 * COPIED * FLOAT
    parts = zip(*(outcome.laps(name, lap) for lap in ("gemm", "adam", "copy")), strict=True)
    return [gemm + adam + copy * read / moved for gemm, adam, copy in parts]


def tables(size: Size, outcome: Outcome) -> list[str]:
    """Return a page's tables for a size."""
    if MACHINE not in outcome.steps:
        return [aux_table(outcome)]
    names = [n for n in outcome.steps if n != MACHINE and not n.endswith((FIT, LOOP))]
    peers = [name for name in names if not is_ours(name)]
    return [
        rates(size, outcome),
        step_table(size, outcome, names),
        *([peer_table(outcome, peers)] if peers else []),
        phase_table(outcome),
    ]


def rates(size: Size, outcome: Outcome) -> str:
    """Return a sentence about what the machine can do."""
    gemm, adam, copy = (median(outcome.laps(MACHINE, lap)) for lap in ("gemm", "adam", "copy"))
    weights = 2 * size.n_features * size.d_model
    return (
        f"Encode GEMM {size.tokens * weights / gemm / 1e9:.0f} GFLOP/s; fused Adam "
        f"{adam / weights * 1e9:.2f} ns a parameter; copy {2 * COPIED * FLOAT / copy / 1e9:.1f} "
        f"GB/s, read and written. Weights and Adam's moments: {state(size) / 2**20:.0f} MiB."
    )


def state(size: Size) -> int:
    """Return the bytes of the weights and of Adam's two moments, float32."""
    return 3 * FLOAT * (2 * size.n_features * size.d_model + size.n_features + size.d_model)


def step_table(size: Size, outcome: Outcome, names: Iterable[str]) -> str:
    """Return a row for each contender: time, memory, and whether it clips gradients."""
    gemm, least = outcome.laps(MACHINE, "gemm"), floor(size, outcome)

    def times(seconds: Sequence[float]) -> list[str]:
        return [
            milliseconds(median(seconds)),
            milliseconds(min(seconds)),
            f"{size.tokens / median(seconds):,.0f}",
            f"{ratio(seconds, gemm):.2f}",
            f"{ratio(seconds, least):.2f}",
        ]

    def memory(peak: int) -> list[str]:
        return [f"{peak / 2**20:.0f}", f"{peak / state(size):.2f}"] if peak > 0 else ["?", "?"]

    rows = [["encode GEMM", *times(gemm), "", "", ""], ["floor", *times(least), "", "", ""]]
    for name in names:
        clips = CLIPS_AT.get(name.split()[0], f"{CLIP}")
        rows.append([name, *times(outcome.seconds(name)), *memory(outcome.peak(name)), clips])
    header = ["step", "ms", "least", "tokens/s", "/ encode GEMM", "/ floor"]
    return table([*header, "peak MiB", "/ weights + Adam", "clips at"], rows)


def peer_table(outcome: Outcome, peers: Iterable[str]) -> str:
    """Return how many times as long as ours each peer's step takes."""
    ours = [name for name in outcome.steps if is_ours(name) and not name.endswith((FIT, LOOP))]
    rows = [
        [name, *(f"{ratio(outcome.seconds(name), outcome.seconds(own)):.1f}" for own in ours)]
        for name in peers
    ]
    return table(["step / ours", *ours], rows)


def phase_table(outcome: Outcome) -> str:
    """Return what a step of ours consists of, in ms and as a share of the whole."""
    rows = []
    for name in ARCHITECTURES:
        if not {name + FIT, name + LOOP} <= outcome.steps.keys():
            continue
        whole = outcome.seconds(name + FIT)
        choose, loss, backward, optimizer = (
            outcome.laps(name + LOOP, lap) for lap in ("match", "loss", "backward", "optimizer")
        )
        decode = [with_it - alone for with_it, alone in zip(loss, choose, strict=True)]
        loop = map(sum, zip(loss, backward, optimizer, strict=True))
        lightning = [fit - bare for fit, bare in zip(whole, loop, strict=True)]
        parts = (choose, decode, backward, optimizer, lightning)
        cells = [f"{milliseconds(median(part))} ({ratio(part, whole):.0%})" for part in parts]
        rows.append([name, *cells, milliseconds(median(whole))])
    header = ["ms", "encode + choose", "decode + loss", "backward", "optimizer", "Lightning", "all"]
    return table(header, rows)


def aux_table(outcome: Outcome) -> str:
    """Return which share of each step the auxiliary loss takes."""
    rows = []
    for name in outcome.steps:
        if name + AUX in outcome.steps:
            both = (name, name + AUX)
            plain, aux = map(outcome.seconds, both)
            times = [milliseconds(median(seconds)) for seconds in (plain, aux)]
            peaks = [f"{outcome.peak(each) / 2**20:.0f}" for each in both]
            rows.append([name, *times, f"{1 - ratio(plain, aux):.0%}", *peaks])
    return table(["step", "ms", "ms with it", "its share", "peak MiB", "MiB with it"], rows)


def is_ours(name: str) -> bool:
    """Return whether a contender is one of ours, with whatever optimizer."""
    return name.split(",")[0] in ARCHITECTURES


def milliseconds(seconds: float) -> str:
    """Return a time in ms, with two digits behind the point if it is short."""
    return f"{seconds * 1e3:.{0 if seconds > 0.02 else 2}f}"


def ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return median(a / b for a, b in zip(seconds, of, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(measured: dict[Size, Outcome], path: Path) -> None:
    """Draw each step as a multiple of the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, every = plt.subplots(
        1, len(measured), figsize=(1.5 + 4 * len(measured), 4), sharey=True, squeeze=False
    )
    for axes, (size, outcome) in zip(every[0], measured.items(), strict=True):
        names = [n for n in outcome.steps if n != MACHINE and not n.endswith((FIT, LOOP))]
        least = floor(size, outcome)
        bars = axes.barh(
            names,
            [ratio(outcome.seconds(name), least) for name in names],
            color=["tab:blue" if is_ours(name) else "tab:gray" for name in names],
        )
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=str(size), xlabel="time of a step / floor")
        axes.margins(x=0.15)
    every[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def processor(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
