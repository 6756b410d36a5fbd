"""Every callback in somebody else's module, of which the SAE is a part."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchmetrics import MetricCollection

from lightning_sae import (
    MutualChoiceSAE,
    SavePretrained,
    SeveralSAEs,
    StandardSAE,
    TopKSAE,
    UsageError,
)
from lightning_sae.callbacks import (
    AdaptiveComputationCallback,
    CalibrateThresholds,
    FeatureDensityFigures,
    FiniteWeights,
    LossRecoveredCallback,
    ResampleDeadFeatures,
    ResultsTable,
    StopOnSignal,
    TokensPerSecond,
    WriteMatches,
)
from lightning_sae.callbacks.find_sae import find_sae, find_saes, trained_together
from lightning_sae.metrics import L0, DeadFeatures, FeatureDensity, FractionOfVarianceUnexplained
from tests.callbacks.fakes import D_MODEL, N_FEATURES, FakeData, activations, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Host(pl.LightningModule):
    """Somebody's module, with metrics of ours in a collection of theirs."""

    def __init__(self, kind=MutualChoiceSAE, **options) -> None:
        super().__init__()
        sae = kind(D_MODEL, N_FEATURES, dead_after_tokens=1, **options)
        self.parts = nn.ModuleDict({"sae": sae})
        metrics = {"l0": L0(), "dead": DeadFeatures(N_FEATURES)}
        self.metrics = MetricCollection(metrics | {"density": FeatureDensity(N_FEATURES)})
        self.fvu = FractionOfVarianceUnexplained(D_MODEL)

    @property
    def sae(self):
        return self.parts["sae"]

    def training_step(self, batch, batch_idx):
        return self.sae.loss(activations(batch))[0]

    def on_train_batch_end(self, *_):
        self.sae.normalize_decoder()

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:  # there are no thresholds
            return
        x = activations(batch)
        self.metrics.update(self.sae.match(x))
        self.fvu.update(self.sae(x), x)
        self.log("fvu", self.fvu)

    test_step = validation_step

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log_dict({k: v for k, v in self.metrics.compute().items() if v.dim() == 0})
            self.metrics.reset()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch, batch_idx):
        return self.sae.match(activations(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(folder, *callbacks, module=None, **options) -> tuple[pl.Trainer, Host]:
    """Check, train, test and predict."""
    host = module or Host(k=2)
    made = trainer(
        folder,
        *callbacks,
        num_sanity_val_steps=2,
        max_epochs=-1,
        max_steps=6,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        logger=TensorBoardLogger(folder, name=""),
        **options,
    )
    made.fit(host, FakeData())
    logged = dict(made.callback_metrics)
    made.test(host, FakeData(), verbose=False)
    made.callback_metrics.update(logged)
    return made, host


def test_language_models_are_run_on_the_part_s_reconstructions(tmp_path):
    made, host = run(tmp_path, LossRecoveredCallback(), AdaptiveComputationCallback())
    names = {"loss_recovered_mean", "kl", "ce_clean", "l0_correlation_surprise"}
    assert {f"val/{name}" for name in names} <= made.callback_metrics.keys()
    alone = host.sae
    made = trainer(tmp_path, LossRecoveredCallback(), AdaptiveComputationCallback())
    (expected,) = made.validate(alone, FakeData(), verbose=False)
    (found,) = made.validate(host, FakeData(), verbose=False)
    assert {name: found[f"val/{name}"] for name in names} == {
        name: expected[f"val/{name}"] for name in names
    }
    assert found["l0"] == pytest.approx(expected["val/l0"])
    assert found["fvu"] == pytest.approx(expected["val/fvu"])


def test_densities_are_those_of_a_metric_in_a_collection(tmp_path):
    made, _ = run(tmp_path, FeatureDensityFigures())
    tags = EventAccumulator(made.logger.log_dir).Reload().Tags()
    assert {"val/density_histogram", "test/density_by_rank"} <= set(tags["images"])


def test_thresholds_of_a_part_are_calibrated(tmp_path):
    _, host = run(tmp_path, CalibrateThresholds())
    x = torch.cat([activations(batch) for batch in FakeData().batches])
    assert len(host.sae.match(x)) == 2 * len(x)


def test_dead_features_of_a_part_are_resampled(tmp_path):
    module = Host(StandardSAE)
    module.sae.encoder.bias.data[:5] = -1e3
    run(tmp_path, ResampleDeadFeatures(every_tokens=30, times=2), module=module)
    assert (module.sae.encoder.bias[:5] > -1).all()


def test_tokens_of_a_part_are_counted_and_it_is_saved(tmp_path, capsys):
    callbacks = SavePretrained(tmp_path / "saved"), FiniteWeights(), ResultsTable(), StopOnSignal()
    made, _ = run(tmp_path, TokensPerSecond(), *callbacks)
    assert made.callback_metrics["train/tokens_per_second"] > 0
    assert (tmp_path / "saved/parts/sae/model.safetensors").is_file()
    capsys.readouterr()


def test_matches_are_written_and_anything_else_is_refused(tmp_path):
    made, host = run(tmp_path, WriteMatches(tmp_path / "matches"))
    made.predict(host, FakeData(), return_predictions=False)
    assert len(list((tmp_path / "matches").iterdir())) == 3
    host.predict_step = lambda batch, batch_idx: host.sae.encode(activations(batch))
    made = trainer(tmp_path, WriteMatches(tmp_path / "others"))
    with pytest.raises(UsageError, match=r"predict_step .* that of Host returns Tensor$"):
        made.predict(host, FakeData(), return_predictions=False)


def test_the_module_itself_is_found_and_what_is_inside_it_is_not():
    sae = TopKSAE(D_MODEL, N_FEATURES, 2)
    assert find_sae(sae, "tokens_seen", of=None) is sae  # and not its history, which has them too
    assert find_sae(nn.ModuleList([sae]), "tokens_seen", of=None) is sae
    compiled = torch.compile(sae, backend="eager")
    assert find_sae(nn.ModuleList([compiled]), "match", "input_mean", of=None) is compiled


def test_none_is_told_and_several_are_refused():
    told = r"^Host does nothing: neither Linear nor a part of it has match and input_mean$"
    with pytest.warns(UserWarning, match=told):
        assert find_sae(nn.Linear(1, 1), "match", "input_mean", of=Host(k=2)) is None
    two = nn.ModuleDict({name: TopKSAE(D_MODEL, N_FEATURES, 2) for name in ("one", "two")})
    with pytest.raises(
        UsageError, match=r"^Host is for one SAE, and ModuleDict has several: one, two"
    ):
        find_sae(two, "match", of=Host(k=2))


def test_those_that_are_trained_together_are_found_and_one_is_not_taken_for_all():
    both = SeveralSAEs(lambda width: TopKSAE(width, N_FEATURES, 2), {"one": 4, "two": 3})
    assert find_saes(both, "match", of=None) == [both.one, both.two]
    assert trained_together(both) == [both.one, both.two]
    with pytest.raises(UsageError, match=r"^Host is for one SAE, and SeveralSAEs has several: one"):
        find_sae(both, "match", of=Host(k=2))
    assert trained_together(both.one) == [both.one]
    two = nn.ModuleDict({name: TopKSAE(D_MODEL, N_FEATURES, 2) for name in ("one", "two")})
    with pytest.raises(UsageError, match=r"has several: one, two$"):
        find_saes(two, "match", of=Host(k=2))
