import gc
import io
import sys
import weakref
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sae.callbacks.drawing import add_figures, add_texts, empty_figure, tensorboards


def test_a_figure_says_what_it_shows_and_on_what_and_belongs_to_no_window():
    figure, axes = empty_figure("Densities", "1,000 tokens")
    assert axes.get_title(loc="left") == "Densities\n1,000 tokens"
    assert figure.axes == [axes]
    assert figure.canvas.manager is None
    pyplot = sys.modules.get("matplotlib.pyplot")  # TensorBoard imports it to render
    assert pyplot is None or pyplot.get_fignums() == []


def test_tensorboards_are_found_on_the_first_rank_alone(tmp_path):
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


class Experiment:
    """What a logger of another's writes to, as wandb's run and mlflow's client are called."""

    def __init__(self):
        self.seen = []

    def log(self, values):  # wandb.Run
        self.seen.append(values)

    def log_figure(self, run_id, figure, artifact_file):  # MlflowClient
        figure.savefig(io.BytesIO())
        self.seen.append((run_id, artifact_file))

    def log_text(self, run_id, text, artifact_file):  # MlflowClient
        self.seen.append((run_id, text, artifact_file))


def test_every_logger_gets_its_figures_in_its_own_way(tmp_path, monkeypatch):
    """Neither wandb nor mlflow is needed to develop this: what is called is what they document."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda figure: type(figure)))
    wandb, mlflow = WandbLogger.__new__(WandbLogger), MLFlowLogger.__new__(MLFlowLogger)
    wandb._prefix, wandb._wandb_init = "", {}
    monkeypatch.setattr(WandbLogger, "experiment", Experiment())
    monkeypatch.setattr(MLFlowLogger, "experiment", Experiment())
    monkeypatch.setattr(MLFlowLogger, "run_id", "run")
    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="", version="table")
    loggers = [wandb, mlflow, table, DummyLogger(), board]
    trainer = SimpleNamespace(is_global_zero=True, loggers=loggers, global_step=30)
    made = []

    def draw():
        figure, axes = empty_figure("Densities", "1,000 tokens")
        axes.plot([1, 2])
        made.append(type(figure))
        return figure

    add_figures(trainer, {"val/one": draw})
    assert len(made) == 1
    assert wandb.experiment.seen == [{"val/one": made, "trainer/global_step": 30}]
    assert mlflow.experiment.seen == [("run", "images/val/one-0000030.png")]
    image = Image.open(tmp_path / "table/images/val/one-0000030.png")
    assert image.size == (700, 450)
    assert len(image.getcolors(2**24)) > 10  # not blank
    board.experiment.flush()
    events = EventAccumulator(board.log_dir).Reload()
    assert [each.step for each in events.Images("val/one")] == [30]


def test_every_logger_gets_its_texts_in_its_own_way(tmp_path, monkeypatch):
    made = SimpleNamespace(Table=lambda columns, data, dataframe: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", made)
    wandb, mlflow = WandbLogger.__new__(WandbLogger), MLFlowLogger.__new__(MLFlowLogger)
    wandb._prefix, wandb._wandb_init = "", {}
    monkeypatch.setattr(WandbLogger, "experiment", Experiment())
    monkeypatch.setattr(MLFlowLogger, "experiment", Experiment())
    monkeypatch.setattr(MLFlowLogger, "run_id", "run")
    board, csv = TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="", version="table")
    loggers = [wandb, mlflow, csv, DummyLogger(), board]
    trainer = SimpleNamespace(is_global_zero=True, loggers=loggers, global_step=30)
    add_texts(trainer, {"val/one": lambda: "ä"})
    assert wandb.experiment.seen == [{"val/one": (["text"], [["ä"]]), "trainer/global_step": 30}]
    assert mlflow.experiment.seen == [("run", "ä", "texts/val/one-0000030.md")]
    assert (tmp_path / "table/texts/val/one-0000030.md").read_text("utf-8") == "ä"
    board.experiment.flush()
    events = EventAccumulator(board.log_dir).Reload()
    (tag,) = events.Tags()["tensors"]
    assert events.Tensors(tag)[0].tensor_proto.string_val == ["ä".encode()]


def test_nothing_is_drawn_where_nobody_would_see_it(tmp_path):
    dont = {"one": lambda: 1 / 0}
    for is_global_zero, logger in ((True, DummyLogger()), (False, CSVLogger(tmp_path))):
        options = {"is_global_zero": is_global_zero, "loggers": [logger], "global_step": 3}
        add_figures(SimpleNamespace(**options), dont)
        add_texts(SimpleNamespace(**options), dont)


class SomeLogger(Logger):
    """One that nobody here knows."""

    name = version = None

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params, *args, **kwargs): ...


@pytest.mark.parametrize(("add", "made"), [(add_figures, "figure"), (add_texts, "text")])
def test_a_logger_that_gets_none_is_named(add, made):
    trainer = SimpleNamespace(is_global_zero=True, loggers=[SomeLogger()], global_step=0)
    with pytest.warns(UserWarning, match="^SomeLogger gets no figures and texts"):
        add(trainer, {made: lambda: pytest.fail("made for nobody")})
