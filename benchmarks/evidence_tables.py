"""Tables and a figure of what `benchmarks.evidence` has measured so far.

    python -m benchmarks.evidence_tables [--figure docs/images/evidence.png] [--results FILE]

prints a table for each size of dictionary and number of matches: means over seeds, and their range.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.evidence import CHIEF, RESULTS, VARIANTS

Results = list[dict[str, Any]]
COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], str]] = {
    "FVU": (lambda r: r["fvu"], ".4f"),
    "loss recovered": (lambda r: r["loss_recovered"], ".4f"),
    "L0 by its own thresholds": (lambda r: r["own"]["l0"], ".2f"),
    "never fired": (lambda r: r["never_fired"], ".0f"),
    "fired less than 5 times": (lambda r: r["fired_less_than_5_times"], ".0f"),
    "FVU without the rarest quarter": (lambda r: r["fvu_without_rarest"]["quarter"], ".4f"),
    "without the rarest half": (lambda r: r["fvu_without_rarest"]["half"], ".4f"),
    "duplicates, %": (lambda r: 100 * r["duplicates"], ".2f"),
    "R² of the law": (lambda r: r.get("zipf_r2"), ".2f"),
    "CPU, s": (lambda r: r["cpu_seconds"], ".0f"),
}

OF_CHIEF = ("#1b7ccb", "#b3246b", "#e0921f")  # as in the other figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and draw the figure if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    results = [json.loads(line) for line in given.results.read_text().splitlines()]
    print("\n\n".join(tables(results)))
    if given.figure:
        draw(results, given.figure)


def tables(results: Results) -> Iterator[str]:
    """Yield a table for each size of dictionary and number of matches."""
    sizes = sorted({(r["run"]["n_features"], r["run"]["k"]) for r in results})
    for n_features, k in sizes:
        rows = [f"| {n_features} features, k = {k} | seeds | {' | '.join(COLUMNS)} |"]
        rows.append("|---" * (len(COLUMNS) + 2) + "|")
        for variant in VARIANTS:
            of_it = [r for r in results if r["run"].items() >= _run(variant, n_features, k).items()]
            if of_it:
                cells = (_cell([get(r) for r in of_it], form) for get, form in COLUMNS.values())
                rows.append(f"| {variant} | {len(of_it)} | {' | '.join(cells)} |")
        yield "\n".join(rows)


def draw(results: Results, file: Path) -> None:
    """Draw dead features over a run, and densities by rank, of the chief variants."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in results if r["run"].items() >= {"n_features": 8192, "k": 16}.items()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    colours = dict(zip(VARIANTS, [*OF_CHIEF, *plt.get_cmap("tab20b").colors], strict=False))
    labelled: dict[str, int] = defaultdict(int)
    for result in shown:
        variant = result["run"]["variant"]
        label = variant if not labelled[variant] else None
        labelled[variant] += 1
        style = {"color": colours[variant], "lw": 1.5 if variant in CHIEF else 0.8}
        tokens, dead = zip(*result["dead_curve"], strict=True)
        left.plot([each / 1e6 for each in tokens], dead, label=label, **style)
        if result["run"]["seed"] == 0:
            right.loglog(*zip(*result["densities"], strict=True), **style)
    left.set(xlabel="million tokens of training", ylabel="features that did not fire for 100,000")
    right.set(xlabel="rank", ylabel="density", ylim=(1e-6, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def _run(variant: str, n_features: int, k: int) -> dict[str, Any]:
    return {"variant": variant, "n_features": n_features, "k": k}


def _cell(measured: list[float | None], form: str) -> str:
    values = [value for value in measured if value is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
