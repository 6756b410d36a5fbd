"""What a run shows: ours by default, what the user names, and nothing if it is told so."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar

from lightning_sae import TopKSAE
from lightning_sae.callbacks import RichStepsBar, TQDMStepsBar
from lightning_sae.cli.console import OneLineSummary, show_steps


def kinds(*callbacks: pl.Callback, named: tuple[type, ...] = (), **options) -> list[type]:
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **options)
    show_steps(trainer, named)
    return [type(each) for each in trainer.callbacks]


def test_lightning_s_own_are_replaced_by_the_kind_that_lightning_chose(monkeypatch):
    assert {RichStepsBar, OneLineSummary} <= set(kinds())
    found = kinds(enable_progress_bar=False, enable_model_summary=False)
    assert not {RichStepsBar, OneLineSummary} & set(found)
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.callback_connector._RICH_AVAILABLE", False
    )
    assert {TQDMStepsBar, OneLineSummary} <= set(kinds())


def test_those_that_the_user_names_stay():
    named = RichProgressBar(), ModelSummary(max_depth=2)
    assert set(map(type, named)) <= set(kinds(*named, named=(RichProgressBar, ModelSummary)))
    assert TQDMProgressBar in kinds(TQDMProgressBar(), named=(TQDMProgressBar,))


def test_a_summary_is_one_line(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr("lightning_sae.cli.console.rank_zero_info", said.append)
    OneLineSummary().on_fit_start(None, TopKSAE(8, 24, 3))
    assert said == ["Training TopKSAE(d_model=8, n_features=24, k=3), 416 parameters"]
