"""The look of all figures, and where they and texts go."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

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
    """Draw figures into the trainer's loggers, and keep nothing of them in memory.

    Those of TensorBoard, Weights & Biases and MLflow show them; beside the CSV of a `CSVLogger`
    they are files, `images/<name>-<step>.png`. Others get none, and a warning says so.

    Args:
        trainer: Its loggers, and its step.
        figures: What makes each one, called only if there is such a logger, by its name there.
    """
    drawing = _into_each(trainer, _drawing_into)
    if not drawing:
        return
    for name, make in figures.items():
        _draw(drawing, name, make, trainer.global_step)
    # A figure's thousands of parts refer to each other, so only this frees it and its pixels,
    # several MB. By itself it is done once in some twenty validations.
    gc.collect()


def add_texts(trainer: pl.Trainer, texts: Mapping[str, Callable[[], str]]) -> None:
    """Write texts, in Markdown, into the loggers that `add_figures` draws into.

    Beside the CSV of a `CSVLogger` they are files, `texts/<name>-<step>.md`.

    Args:
        trainer: Its loggers, and its step.
        texts: What makes each one, called only if there is such a logger, by its name there.
    """
    writing = _into_each(trainer, _writing_into)
    for name, make in texts.items() if writing else ():
        text = make()
        for write in writing:
            write(name, text, trainer.global_step)


Draw = Callable[[str, Any, int], object]
"""Shows a figure, given its name and the step."""


def _draw(drawing: list[Draw], name: str, make: Callable[[], Figure], step: int) -> None:
    figure = make()
    for draw in drawing:
        draw(name, figure, step)


def _into_each(trainer: pl.Trainer, into: Callable[[Logger], T | None]) -> list[T]:
    """Return what `into` knows of each of the first rank's loggers, and warn of the others."""
    found = []
    for logger in trainer.loggers if trainer.is_global_zero else []:
        known = into(logger)
        if known is None and not isinstance(logger, DummyLogger):  # which is that of fast_dev_run
            rank_zero_warn(
                f"{type(logger).__name__} gets no figures and texts: these go to TensorBoard, "
                "Weights & Biases, MLflow, and beside the file of a CSVLogger"
            )
        if known is not None:
            found.append(known)
    return found


def _drawing_into(logger: Logger) -> Draw | None:
    """Return what draws into a logger; None if we do not know."""
    if isinstance(logger, TensorBoardLogger):
        board: Any = logger.experiment
        return lambda name, figure, step: board.add_figure(name, figure, step)
    if isinstance(logger, WandbLogger):
        return lambda name, figure, step: logger.log_image(name, [figure], step)
    if isinstance(logger, MLFlowLogger):
        client, run_id = logger.experiment, logger.run_id
        return lambda name, figure, step: client.log_figure(run_id, figure, _image(name, step))
    if isinstance(logger, CSVLogger):
        return lambda name, figure, step: _write(_png(figure), logger, _image(name, step))
    return None


def _writing_into(logger: Logger) -> Callable[[str, str, int], object] | None:
    """Return what writes text into a logger; None if we do not know."""
    if isinstance(logger, TensorBoardLogger):
        board: Any = logger.experiment
        return lambda name, text, step: board.add_text(name, text, step)
    if isinstance(logger, WandbLogger):
        return lambda name, text, step: logger.log_text(name, ["text"], [[text]], step=step)
    if isinstance(logger, MLFlowLogger):
        client, run_id = logger.experiment, logger.run_id
        return lambda name, text, step: client.log_text(run_id, text, _text(name, step))
    if isinstance(logger, CSVLogger):
        return lambda name, text, step: _write(text.encode(), logger, _text(name, step))
    return None


def _image(name: str, step: int) -> str:
    return f"images/{name}-{step:07d}.png"


def _text(name: str, step: int) -> str:
    return f"texts/{name}-{step:07d}.md"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _write(content: bytes, logger: CSVLogger, name: str) -> None:
    path = f"{logger.log_dir}/{name}"
    files = get_filesystem(path)  # as the logger finds that of its CSV
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, content)
