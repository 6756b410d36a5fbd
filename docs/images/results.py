"""Draws `results.png` from the runs of `notebooks/paper_claims.py`."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "notebooks" / "paper_claims.jsonl"
SHOWN = {
    "standard": ("Standard", "#8c8c8c", "^", "-"),
    "topk": ("TopK", "#1b7ccb", "s", "-"),
    "feature uniform, aux_zipf": ("Feature Choice, uniform budgets", "#e0921f", "D", ":"),
    "feature zipf by token_norm, aux_zipf": ("Feature Choice", "#e0921f", "D", "-"),
    "mutual by token_norm, aux_zipf": ("Mutual Choice", "#b3246b", "o", "-"),
}
"""What is drawn of each variant: its name, its colour, and how its points and lines look."""
PANELS = {
    "loss_lost": ("loss of the language model that is not recovered", "log"),
    "dying_fraction": ("dying features", "linear"),
}
"""What is drawn, the panel's title, and its scale."""
PERCENT = mpl.ticker.PercentFormatter(1, decimals=0)


def main() -> None:
    """Draw the picture."""
    runs = defaultdict(list)
    for line in RUNS.read_text().splitlines():
        run = json.loads(line)
        run["loss_lost"] = 1 - run["loss_recovered_mean"]
        runs[run["variant"], run["k"]].append(run)
    mpl.rcParams["font.size"] = 11
    figure, all_axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axes, (name, (title, scale)) in zip(all_axes, PANELS.items(), strict=True):
        for variant, (label, colour, marker, line) in SHOWN.items():
            groups = [runs[variant, k] for k in (8, 16, 32)]
            l0 = [fmean(run["l0"] for run in group) for group in groups]
            mean = [fmean(run[name] for run in group) for group in groups]
            axes.plot(l0, mean, color=colour, marker=marker, linestyle=line, label=label)
            for x, group in zip(l0, groups, strict=True):
                axes.vlines(x, *extremes(run[name] for run in group), color=colour)
        axes.set(xscale="log", yscale=scale, xlabel="matches per token (L0)", title=title)
        axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.yaxis.set_major_formatter(PERCENT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.6)
    ticks = [0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8]
    all_axes[0].set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    all_axes[0].yaxis.set_minor_locator(mpl.ticker.NullLocator())
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(HERE / "results.png", dpi=110)


def extremes(values: Iterable[float]) -> tuple[float, float]:
    """Return the smallest and the largest."""
    found = list(values)
    return min(found), max(found)


if __name__ == "__main__":
    main()
