"""Pictures of how often features fire, for loggers and for notebooks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sae.callbacks.drawing import (
    DARK,
    LIGHT,
    MEDIUM,
    add_figures,
    empty_figure,
    tensorboards,
)
from lightning_sae.callbacks.find_sae import trained_together
from lightning_sae.checks import UsageError
from lightning_sae.metrics import FeatureDensity
from lightning_sae.parallel import ranks_of
from lightning_sae.part import part_of
from lightning_sae.zipf import ZipfFitError, fit_zipf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS_PER_DECADE = 5
_MOST_POINTS = 10_000  # of a curve; millions of features would look the same, only slower


class FeatureDensityFigures(Callback):
    """Draws feature densities into loggers at the end of every validation and test.

    Under `val/` or `test/`: the figures `density_histogram` and `density_by_rank`, into
    TensorBoard, Weights & Biases, MLflow, or a folder `images` beside the CSV of a `CSVLogger`; and
    a histogram `log10_density` of the live features that TensorBoard can lay out over time.

    The densities are those of the module's `feature_density`, as `SparseAutoencoder` has it, or of
    the first `FeatureDensity` among its metrics that was updated, in a `MetricCollection` too.
    """

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, unless this is only the check before training."""
        if not trainer.sanity_checking:
            _log_figures(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        _log_figures(trainer, pl_module, "test")


def plot_density_histogram(density: Tensor, tokens: int) -> Figure:
    """Draw how many features fire how often, the dead ones as a bar of their own.

    Args:
        density: Share of tokens on which each feature fires, (features,).
        tokens: Tokens over which it was measured; 1 / tokens is the smallest density there is.

    Returns:
        A figure that belongs to no window: save it with `savefig`, or let a notebook show it.

    Raises:
        ValueError: If `density` is no vector of shares or `tokens` is not positive.
    """
    live = _live(density, tokens)
    decades = max(1, math.ceil(math.log10(tokens)))
    logs = live.log10().clamp(-decades, 0.0)  # rounding may lead out of the range
    counts, edges = torch.histogram(logs, decades * _BINS_PER_DECADE, range=(-decades, 0.0))
    dead = density.numel() - live.numel()

    figure, axes = _axes(density, tokens, "Feature densities")
    axes.stairs(counts.numpy(), edges.numpy(), fill=True, color=MEDIUM)
    axes.bar(-decades - 0.7, dead, width=0.4, color=LIGHT, edgecolor=MEDIUM)
    powers = list(range(-decades, 1))
    labels = [f"$10^{{{power}}}$" for power in powers]
    axes.set_xticks([-decades - 0.7, *powers], [f"dead:\n{dead:,}", *labels])
    axes.set_xlabel("density (share of tokens on which a feature fires)")
    axes.set_ylabel("features")
    # Where most are dead, their bar leaves the picture, or the others would be too low to see.
    most = counts.max().item()
    axes.set_ylim(0, 1.05 * max(most, min(dead, 3 * most or dead)))
    return figure


def plot_rank_density(density: Tensor, tokens: int) -> Figure:
    """Draw density against rank on logarithmic axes, with the fitted Zipf-Mandelbrot law.

    Args:
        density: Share of tokens on which each feature fires, (features,), in any order.
        tokens: Tokens over which it was measured.

    Returns:
        A figure that belongs to no window: save it with `savefig`, or let a notebook show it. If
        too few features fire for a fit, it has no curve and says so.

    Raises:
        ValueError: If `density` is no vector of shares or `tokens` is not positive.
    """
    live = _live(density, tokens)
    spread = torch.logspace(0, math.log10(max(len(live), 1)), _MOST_POINTS, dtype=torch.float64)
    ranks = spread.round().long().unique()

    figure, axes = _axes(density, tokens, "Feature density by rank")
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = ranks[ranks <= len(live)]  # none, if all are dead
    points = shown.numpy(), live[shown - 1].numpy()
    axes.plot(*points, ".", color=MEDIUM, markersize=5, label="live features")
    try:
        law = fit_zipf(density, tokens)
    except ZipfFitError:
        axes.plot([], [], " ", label="too few live features for a Zipf fit")
    else:
        label = (
            f"Zipf-Mandelbrot: s = {law.exponent:.2f}, q = {law.offset:.1f}\n"
            f"$R^2$ = {law.r2:.3f} (middle ranks {law.r2_middle:.3f})"
        )
        axes.plot(ranks.numpy(), law.density(ranks).numpy(), color=DARK, label=label)
    axes.set_xlabel("rank of the feature, densest first")
    axes.set_ylabel("density (share of tokens)")
    axes.legend(loc="lower left", frameon=False)
    return figure


def _log_figures(trainer: pl.Trainer, pl_module: nn.Module, stage: str) -> None:
    for each in trained_together(pl_module):
        _log_figures_of(each, trainer, part_of(each).stage(stage))


def _log_figures_of(module: Any, trainer: pl.Trainer, stage: str) -> None:
    metrics = _densities(module)
    if not metrics:
        name = type(module).__name__
        rank_zero_warn(f"FeatureDensityFigures draws nothing: {name} has no FeatureDensity metric")
    # Every rank must take part in these two, or the others would wait for it for ever.
    counts = [torch.as_tensor(metric.tokens, device=module.device) for metric in metrics]
    totals = [int(ranks_of(trainer).all_reduce(count)) for count in counts]
    updated = [place for place, total in enumerate(totals) if total > 0]
    if not updated:
        return
    density, tokens = metrics[updated[0]].compute(), totals[updated[0]]
    figures = {
        f"{stage}/density_histogram": lambda: plot_density_histogram(density, tokens),
        f"{stage}/density_by_rank": lambda: plot_rank_density(density, tokens),
    }
    add_figures(trainer, figures)
    logs = density[density > 0].log10()
    for board in tensorboards(trainer) if len(logs) else []:
        board.add_histogram(f"{stage}/log10_density", logs, trainer.global_step, bins=60)


def _densities(module: nn.Module) -> list[Metric]:
    """Return the metrics of densities that a module has, its own before those of its parts."""
    own = getattr(module, "feature_density", None)
    if own is not None:
        return [own]
    found: list[Metric] = []
    for part in module.modules():
        if isinstance(part, MetricCollection):  # which must be asked, for metrics share counts
            found += part.values(copy_state=False)
        elif isinstance(part, Metric):
            found.append(part)
    return [metric for metric in found if type(metric) is FeatureDensity]  # others derive from it


def _live(density: Tensor, tokens: int) -> Tensor:
    """Return the densities above 0, largest first, (live features,), float64 on the CPU."""
    if tokens < 1 or density.ndim != 1 or not ((density >= 0) & (density <= 1)).all():
        shape = tuple(density.shape)
        raise UsageError(f"{tokens=} must be > 0, density of {shape=} a vector within 0 .. 1")
    return density[density > 0].detach().cpu().double().sort(descending=True).values


def _axes(density: Tensor, tokens: int, title: str) -> tuple[Figure, Axes]:
    """Return an empty figure whose title tells how many of how many features are dead."""
    dead = (density == 0).float().mean().item()
    return empty_figure(
        title, f"{density.numel():,} features on {tokens:,} tokens, {dead:.1%} dead"
    )
