"""The HPARAMS tab, as TensorBoard reads it from the file of events."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.data import DataLoader

from lightning_sae import MutualChoiceSAE
from lightning_sae.callbacks import HParamsTab
from tests.callbacks.fakes import FakeSAE, tensors, trainer
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:You defined a `validation_step` but have no"
)


def tab(logger: TensorBoardLogger) -> tuple[dict, set[str], dict[str, list[float]]]:
    """The hyperparameters, the names of figures, and the curves of these."""
    events = EventAccumulator(logger.log_dir).Reload()
    parts = (
        events.SummaryMetadata("_hparams_/session_start_info"),
        events.SummaryMetadata("_hparams_/experiment"),
    )
    start, experiment = (
        plugin_data_pb2.HParamsPluginData.FromString(part.plugin_data.content) for part in parts
    )
    values = dict(start.session_start_info.hparams)
    kinds = {"number_value", "string_value", "bool_value"}
    found = {name: getattr(v, v.WhichOneof("kind")) for name, v in values.items()}
    assert {v.WhichOneof("kind") for v in values.values()} <= kinds
    names = {info.name.tag for info in experiment.experiment.metric_infos}
    curves = {name: [event.value for event in events.Scalars(name)] for name in names}
    return found, names, curves


def test_it_shows_what_a_run_was_made_with_and_the_last_figures(tmp_path):
    torch.manual_seed(0)
    adam = partial(torch.optim.Adam, lr=0.25)
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, optimizer=adam)
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    run = trainer(tmp_path, HParamsTab(), logger=logger, max_steps=4, max_epochs=-1)
    run.fit(sae, DataLoader(activations(256), 128), DataLoader(activations(128), 128))
    made_with, names, curves = tab(logger)
    expected = {"k": K, "n_features": N_FEATURES, "lr": 0.25, "optimizer": "Adam", "max_steps": 4}
    assert expected.items() <= made_with.items()
    assert {
        "importance": "affinity",
        "k_aux": D_MODEL // 2,
        "max_norm_multiple": "None",
    }.items() <= (made_with.items())
    assert names == {name for name in run.callback_metrics if name.startswith("val/")}
    assert len(curves["val/fvu"]) == 2  # and no further point
    assert curves["val/fvu"][-1] == pytest.approx(float(run.callback_metrics["val/fvu"]))


def test_without_a_validation_it_shows_training_and_other_loggers_are_left_alone(tmp_path):
    board = TensorBoardLogger(tmp_path, name="a", default_hp_metric=False)
    run = trainer(tmp_path, HParamsTab(), logger=[CSVLogger(tmp_path, name="b"), board])
    module = FakeSAE()
    module.training_step = lambda batch: module.log("train/x", 3.0) or module.factor.square()
    run.fit(module, tensors())
    made_with, names, curves = tab(board)
    assert made_with["optimizer"] == "SGD"
    assert names == {"train/x"}
    assert curves["train/x"][-1] == 3.0
    trainer(tmp_path, HParamsTab()).fit(FakeSAE(), tensors(), tensors(1))
