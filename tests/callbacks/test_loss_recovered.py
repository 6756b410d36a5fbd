import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.metrics import LossRecovered
from tests.callbacks.fakes import (
    FakeData,
    FakeLanguageModel,
    FakeSAE,
    contexts,
    first_contexts,
    tensors,
    trainer,
)


def expected(module, batches):
    metric = LossRecovered()
    module.eval()
    for batch in batches:
        metric.update(
            FakeLanguageModel(), batch["input_ids"], module, batch["kept"], module.input_mean
        )
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_values_are_those_of_the_metric_over_all_batches(tmp_path, stage):
    module = FakeSAE()
    run = trainer(tmp_path, LossRecoveredCallback())
    evaluate = run.validate if stage == "val" else run.test
    (logged,) = evaluate(module, datamodule=FakeData(), verbose=False)
    wanted = expected(module, contexts(3))
    assert 0 < wanted["loss_recovered_mean"] < 1
    for name, value in wanted.items():
        assert logged[f"{stage}/{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("tokens", "measured"), [(1, 1), (6, 1), (7, 2), (30, 5), (31, 6), (60, 10), (1000, 15)]
)
def test_it_stops_when_it_has_measured_enough(tmp_path, tokens, measured):
    module = FakeSAE()
    run = trainer(tmp_path, LossRecoveredCallback(tokens=tokens))  # a context has 6
    for _ in range(2):  # each time anew
        (logged,) = run.validate(module, datamodule=FakeData(), verbose=False)
        wanted = expected(module, first_contexts(measured, contexts(3)))
        assert logged["val/ce_clean"] == pytest.approx(wanted["ce_clean"], rel=1e-6)


def test_it_measures_something():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        LossRecoveredCallback(tokens=0)


class Uncalibrated(FakeSAE):
    """Cannot be evaluated before it was trained, like an SAE without thresholds."""

    def forward(self, x):
        assert self.tokens_seen > 0
        return super().forward(x)


def test_each_validation_starts_afresh_and_the_sanity_check_leaves_nothing(tmp_path):
    module = Uncalibrated()
    logger = CSVLogger(tmp_path, name="")
    run = trainer(tmp_path, LossRecoveredCallback(), logger=logger, max_epochs=2)
    run.fit(module, datamodule=FakeData())
    wanted = expected(module, contexts(3))
    assert run.num_sanity_val_steps > 0
    for name, value in wanted.items():
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(value, rel=1e-5)
    rows = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3  # a header and two validations
    assert "val/loss_recovered_mean" in rows[0]


class Moving(FakeSAE):
    """Takes another mean activation with each step."""

    def training_step(self, batch):
        self.input_mean += 0.5
        return super().training_step(batch)


@pytest.mark.parametrize(
    ("module", "trains", "runs"),
    [(FakeSAE, False, 4 + 2 + 2), (FakeSAE, True, 4 + 4 + 4), (Moving, False, 4 + 4 + 4)],
)
def test_what_ablation_costs_is_measured_once_unless_it_changes(tmp_path, module, trains, runs):
    sae, data = module(), FakeData()
    data.residual_stream.model.requires_grad_(trains)
    logger = CSVLogger(tmp_path, name="")
    run = trainer(
        tmp_path, LossRecoveredCallback(), logger=logger, max_epochs=3, num_sanity_val_steps=0
    )
    run.fit(sae, datamodule=data)
    assert data.residual_stream.runs == 3 * runs  # batches
    wanted = expected(sae, contexts(3))
    for name, value in wanted.items():
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(value, rel=1e-5)
    # Nothing is remembered beyond a run: the language model may be another.
    run.validate(sae, datamodule=FakeData(), verbose=False)
    other = FakeData()
    other.residual_stream.embeddings *= 2
    (logged,) = run.validate(sae, datamodule=other, verbose=False)
    assert logged["val/ce_zero"] == pytest.approx(wanted["ce_zero"])
    assert logged["val/ce_mean"] != pytest.approx(wanted["ce_mean"])


def test_it_measures_without_gradients_and_in_eval_mode(tmp_path):
    # `FakeLanguageModel.replace` and `FakeSAE.forward` assert it.
    run = trainer(tmp_path, LossRecoveredCallback(), inference_mode=False)
    run.fit(FakeSAE(), datamodule=FakeData())
    assert "val/delta_ce" in run.callback_metrics


@pytest.mark.parametrize("data", ["tensors", "no language model", "no ids"])
def test_other_data_is_left_alone(tmp_path, data):
    run = trainer(tmp_path, LossRecoveredCallback())
    module = FakeSAE()
    if data == "tensors":
        logged = run.validate(module, tensors(), verbose=False)
    else:
        datamodule = FakeData(residual_stream=data == "no ids")
        if data == "no ids":
            for batch in datamodule.batches:
                del batch["input_ids"]
        logged = run.validate(module, datamodule=datamodule, verbose=False)
    assert logged == [{}]


def test_a_model_that_sees_later_tokens_has_no_loss(tmp_path):
    data = FakeData()
    data.residual_stream.is_causal_language_model = False
    run = trainer(tmp_path, LossRecoveredCallback())
    with pytest.warns(UserWarning, match=r"^LossRecoveredCallback measures nothing: ParameterList"):
        assert run.validate(FakeSAE(), datamodule=data, verbose=False) == [{}]
    batch = data.batches[0]
    with pytest.raises(
        ValueError, match=r"^ParameterList does not predict tokens from those before"
    ):
        LossRecovered().update(
            data.residual_stream, batch["input_ids"], FakeSAE(), batch["kept"], torch.zeros(4)
        )


def test_it_works_in_16_bit_training(tmp_path):
    class Wide(FakeSAE):
        def forward(self, x):
            return super().forward(x.to(self.factor.dtype))

        def validation_step(self, batch):
            assert self.factor.dtype == torch.bfloat16

    run = trainer(tmp_path, LossRecoveredCallback(), precision="bf16-true")
    (logged,) = run.validate(Wide(), datamodule=FakeData(), verbose=False)
    wanted = expected(FakeSAE(), contexts(3))
    assert logged["val/ce_clean"] == pytest.approx(wanted["ce_clean"], rel=1e-5)
    assert logged["val/delta_ce"] == pytest.approx(wanted["delta_ce"], rel=2e-2)
