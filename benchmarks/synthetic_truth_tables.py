"""Tables and a figure of what `benchmarks.synthetic_truth` has measured so far.

    python -m benchmarks.synthetic_truth_tables [--figure docs/images/known_truth.png]

prints a table for each kind of truth: means over seeds, and their standard deviations.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.synthetic_truth import CHIEF, RESULTS, SWEEP, TRUTHS, VARIANTS

Results = list[dict[str, Any]]
COLUMNS = {
    "L0": ("l0", 2),
    "FVU": ("fvu", 3),
    "MMCS, true": ("mmcs_true", 3),
    "MMCS, learned": ("mmcs_learned", 3),
    "uniqueness": ("uniqueness", 2),
    "precision": ("feature_precision", 2),
    "recall": ("feature_recall", 2),
    "F1": ("feature_f1", 3),
    "dead": ("dead_fraction", 3),
    "absorption": ("absorption", 3),
    "its fraction": ("absorption_fraction", 3),
}
SHOWN = {"FVU": "fvu", "MMCS of true directions": "mmcs_true", "F1 of features": "feature_f1"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and draw the figure if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(arguments)
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("\n\n".join(tables(results)))
    if SWEEP.exists():
        swept = [json.loads(line) for line in SWEEP.read_text().splitlines()]
        print("\n" + rates(swept))
    if given.figure:
        draw(results, given.figure)


def tables(results: Results) -> Iterator[str]:
    """Yield a table for each kind of truth."""
    for truth in TRUTHS:
        of_truth = [r for r in results if r["run"]["truth"] == truth]
        names = [name for name, (key, _) in COLUMNS.items() if any(key in r for r in of_truth)]
        rows = [f"| {truth} | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for variant in VARIANTS:
            of_it = [r for r in of_truth if r["run"]["variant"] == variant]
            if of_it:
                cells = (_cell([r[COLUMNS[n][0]] for r in of_it], COLUMNS[n][1]) for n in names)
                rows.append(f"| {variant} | {len(of_it)} | {' | '.join(cells)} |")
        yield "\n".join(rows)


def rates(swept: Results) -> str:
    """Return a table of FVU by learning rate."""
    found = {(r["run"]["variant"], r["run"]["lr"]): r["fvu"] for r in swept}
    tried = sorted({lr for _, lr in found})
    names = dict.fromkeys(name for name, _ in found)
    head = ["FVU", *(f"{lr:g}" for lr in tried)]
    rows = [[name, *(f"{found[name, lr]:.3f}" for lr in tried)] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def draw(results: Results, file: Path) -> None:
    """Draw what the chief variants reach on each kind of truth, a bar a mean and a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(SHOWN), figsize=(11, 3.6), constrained_layout=True)
    colours = plt.get_cmap("tab10").colors
    for axes, (title, key) in zip(all_axes, SHOWN.items(), strict=True):
        for place, variant in enumerate(CHIEF):
            for group, truth in enumerate(TRUTHS):
                wanted = {"variant": variant, "truth": truth}.items()
                values = [r[key] for r in results if r["run"].items() >= wanted]
                if values:
                    x = group + (place - (len(CHIEF) - 1) / 2) * 0.12
                    label = variant if group == 0 else None
                    axes.bar(x, mean(values), 0.11, color=colours[place], label=label)
                    axes.plot([x] * len(values), values, "k.", markersize=2)
        axes.set_xticks(range(len(TRUTHS)), TRUTHS)
        axes.set_title(title)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
