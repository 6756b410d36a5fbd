import sys
from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sae.callbacks.drawing import empty_figure, tensorboards


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
