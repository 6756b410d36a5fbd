"""The look of all figures, and where they go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT: Final = "#c6d7ea"
MEDIUM: Final = "#6a9bcd"
DARK: Final = "#17375e"


def empty_figure(title: str, measured: str) -> tuple[Figure, Axes]:
    """Return a figure that belongs to no window, and its axes, ready to be drawn on.

    Args:
        title: What the figure shows.
        measured: What that was measured on.
    """
    from matplotlib.figure import Figure  # takes a second: only where something is drawn

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n{measured}", loc="left", size=11)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def tensorboards(trainer: pl.Trainer) -> list[Any]:
    """Return the `SummaryWriter`s of the trainer's TensorBoard loggers, on the first rank only."""
    if not trainer.is_global_zero:
        return []
    loggers = (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return [logger.experiment for logger in loggers]


def add_figures(trainer: pl.Trainer, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw figures into the trainer's TensorBoard loggers, and keep nothing of them in memory.

    Args:
        trainer: Its loggers, and its step.
        figures: What makes each one, called only if there is a TensorBoard, by its name there.
    """
    boards = tensorboards(trainer)
    for board in boards:
        for name, make in figures.items():
            board.add_figure(name, make(), trainer.global_step)
    if boards:
        # A figure's thousands of parts refer to each other, so only this frees it and its pixels,
        # several MB. By itself it is done once in some twenty validations.
        gc.collect()
