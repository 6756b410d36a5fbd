import gc
import sys
import weakref
from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sae.callbacks.drawing import add_figures, empty_figure, tensorboards


def test_a_figure_says_what_it_shows_and_on_what_and_belongs_to_no_window():
    figure, axes = empty_figure("Densities", "1,000 tokens")
    assert axes.get_title(loc="left") == "Densities\n1,000 tokens"
    assert figure.axes == [axes]
    assert figure.canvas.manager is None
    pyplot = sys.modules.get("matplotlib.pyplot")  # TensorBoard imports it to render
    assert pyplot is None or pyplot.get_fignums() == []


def test_figures_go_to_tensorboard_alone_and_from_the_first_rank_alone(tmp_path):
    boards = [TensorBoardLogger(tmp_path, name=name) for name in ("a", "b")]
    loggers = [boards[0], CSVLogger(tmp_path), boards[1]]
    found = tensorboards(SimpleNamespace(is_global_zero=True, loggers=loggers))
    assert found == [board.experiment for board in boards]
    assert tensorboards(SimpleNamespace(is_global_zero=False, loggers=loggers)) == []


def test_nothing_is_kept_of_a_figure_that_was_drawn(tmp_path):
    drawn = weakref.WeakSet()

    def draw():
        figure, _ = empty_figure("Densities", "1,000 tokens")
        drawn.add(figure)
        return figure

    board = TensorBoardLogger(tmp_path)
    gc.disable()
    try:
        board.experiment.add_figure("alone", draw(), 0)
        assert len(drawn) == 1  # by itself it is kept
        trainer = SimpleNamespace(is_global_zero=True, loggers=[board], global_step=3)
        add_figures(trainer, {"one": draw, "two": draw})
    finally:
        gc.enable()
    assert len(drawn) == 0


def test_nothing_is_drawn_without_a_tensorboard(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, loggers=[CSVLogger(tmp_path)], global_step=3)
    add_figures(trainer, {"one": lambda: 1 / 0})
