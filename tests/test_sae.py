"""Every architecture in a Trainer: its steps, its checkpoints, what it logs."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_sae import MutualChoiceSAE, SparseAutoencoder, TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.metrics import TokenCount
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations, every_architecture

# A Trainer that only trains is right for a test, and Lightning remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Host(pl.LightningModule):
    """Somebody else's module that trains an SAE among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
        self.probe = nn.Linear(D_MODEL, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        sae_loss, stats = self.sae.loss(x)
        self.log("l0", stats["l0"])
        return sae_loss + functional.mse_loss(self.probe(self.sae(x)).squeeze(1), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def quiet_trainer(**kwargs) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def loader(tokens: int = 2048, *columns: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(activations(tokens), *columns), batch_size=128)


def test_trains_as_a_child_of_another_module():
    host = Host()
    before = host.sae.W_dec.detach().clone()
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(host, loader(2048, torch.randn(2048)))
    assert not torch.allclose(before, host.sae.W_dec)
    assert trainer.callback_metrics["l0"] == pytest.approx(K)
    host.eval()
    assert host.sae(activations()).shape == (64, D_MODEL)


class KeepOutputs(pl.Callback):
    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.outputs = outputs


@every_architecture
def test_callbacks_get_what_a_validation_step_made_of_its_batch(make):
    sae, kept = make(), KeepOutputs()
    sae.loss(activations())  # sets thresholds
    x = activations()
    quiet_trainer(callbacks=[kept]).validate(sae, DataLoader([x], batch_size=None), verbose=False)
    codes, reconstruction = kept.outputs["encoded"]
    assert torch.equal(codes.to_dense(), sae.encode(x))
    assert torch.equal(reconstruction, sae(x))


@every_architecture
@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoint_from_python_restores_everything(make, accumulate: int, tmp_path):
    sae = make(optimizer=torch.optim.AdamW)
    trainer = quiet_trainer(max_steps=5, accumulate_grad_batches=accumulate, max_epochs=-1)
    trainer.fit(sae, loader(4096))
    path = tmp_path / "sae.ckpt"
    trainer.save_checkpoint(path)

    raw = torch.load(path, weights_only=True)  # no code runs on loading
    norms = raw["state_dict"]["decoder.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(N_FEATURES), atol=1e-6, rtol=0)

    again = type(sae).load_from_checkpoint(path)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    x = activations()
    assert torch.equal(again.eval()(x), sae.eval()(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_decoder_norms_are_exact_in_files_that_a_callback_writes(accumulate: int, tmp_path):
    """Callbacks write checkpoints before the module's own end-of-batch hook runs."""
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=checkpoint,
        max_steps=3,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        norms = torch.load(file, weights_only=True)["state_dict"]["decoder.weight"].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(N_FEATURES), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_longer_run_goes_on_learning_from_a_finished_one(tmp_path):
    """The rate fell to zero; with more steps to go it must be above zero again."""
    first = TopKSAE(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(first, loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = TopKSAE(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_steps=8)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert not torch.allclose(first.encoder.weight, second.encoder.weight)


def test_the_learning_rate_has_a_schedule_by_the_steps_of_the_run():
    class Rates(pl.Callback):
        seen: list[float] = []  # noqa: RUF012 - one run

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    sae = TopKSAE(D_MODEL, N_FEATURES, K, optimizer=partial(torch.optim.Adam, lr=1.0))
    quiet_trainer(max_steps=10, callbacks=rates).fit(sae, loader())
    assert rates.seen == pytest.approx([1.0] + [(1 - step / 10) / 0.95 for step in range(1, 10)])


@pytest.mark.parametrize("kind", [TopKSAE, MutualChoiceSAE])
@pytest.mark.parametrize(
    ("name", "other"), [("k", K + 1), ("importance", "gain"), ("normalize_inputs", "token")]
)
def test_settings_on_which_codes_depend_are_those_of_the_checkpoint(kind, name, other, tmp_path):
    path = tmp_path / "last.ckpt"
    trainer = quiet_trainer(max_steps=1)
    settings = {"k": K, "importance": "affinity", "normalize_inputs": "average"}
    trainer.fit(kind(D_MODEL, N_FEATURES, **settings), loader())
    trainer.save_checkpoint(path)
    told = f"^{name}={other!r}: the SAE in the checkpoint was trained with {name}="
    changed = kind(D_MODEL, N_FEATURES, **settings | {name: other})
    with pytest.raises(UsageError, match=told):
        quiet_trainer().test(changed, loader(), ckpt_path=path)
    with pytest.raises(UsageError, match=told):
        quiet_trainer(max_steps=2).fit(changed, loader(), ckpt_path=path)
    with pytest.raises(UsageError, match=told):
        kind.load_from_checkpoint(path, **{name: other})
    (tmp_path / "hparams.yaml").write_text(
        "\n".join(f"{key}: {value}" for key, value in changed.hparams.items() if value is not None)
    )
    with pytest.raises(UsageError, match=told):
        kind.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.yaml")
    again = kind.load_from_checkpoint(path, **settings, aux_coefficient=0.0)  # of no code
    assert (again.k, again.importance) == (K, "affinity")


class MeasuredSAE(TopKSAE):
    """One that also counts held-out tokens by another name."""

    def configure_metrics(self):
        return super().configure_metrics() | {"counted": TokenCount()}


def test_a_trained_sae_is_measured_by_a_class_that_extends_its_own(tmp_path):
    trained = TopKSAE(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "topk.ckpt")
    measured = MeasuredSAE.load_from_checkpoint(tmp_path / "topk.ckpt")
    assert torch.equal(measured.W_dec, trained.W_dec)
    for ckpt_path, sae in (
        (None, measured),
        (tmp_path / "topk.ckpt", MeasuredSAE(D_MODEL, N_FEATURES, K)),
    ):
        (found,) = quiet_trainer().test(sae, loader(), ckpt_path=ckpt_path)
        assert found["test/counted"] == found["test/tokens"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    trainer.save_checkpoint(tmp_path / "topk.ckpt")
    for other in (MutualChoiceSAE(D_MODEL, N_FEATURES, K), TopKSAE(D_MODEL, N_FEATURES + 1, K)):
        with pytest.raises(ValueError, match="the checkpoint holds TopKSAE") as caught:
            quiet_trainer().test(other, loader(), ckpt_path=tmp_path / "topk.ckpt")
        assert "\n" not in str(caught.value)


def test_evaluation_in_a_trainer_measures_held_out_tokens():
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, optimizer=partial(torch.optim.Adam, lr=3e-3))
    trainer = quiet_trainer(max_epochs=10)
    trainer.fit(sae, loader(4096), loader(1000))  # sanity checking precedes calibration
    assert {"val/fvu", "val/l0_std", "val/dying_fraction"} <= trainer.callback_metrics.keys()
    metrics = trainer.test(sae, loader(1000), verbose=False)[0]
    sae.eval()
    x = activations(1000)
    codes = sae.encode(x)
    assert metrics["test/l0"] == pytest.approx((codes > 0).sum(1).float().mean().item())
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics["test/fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    dead = (codes > 0).sum(0) == 0
    assert metrics["test/dead_fraction"] == pytest.approx(dead.float().mean().item())
    assert metrics["test/threshold"] == pytest.approx(sae.threshold.item())


class WithMetric(TopKSAE):
    """Someone's SAE with a metric of their own."""

    def configure_metrics(self) -> dict[str, Metric]:
        return super().configure_metrics() | {"largest_code": LargestCode()}


class LargestCode(Metric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, codes: Matches) -> None:
        self.largest = self.largest.maximum(codes.value.max())

    def compute(self) -> torch.Tensor:
        return self.largest


def test_a_metric_of_one_s_own_is_logged():
    sae = WithMetric(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(sae, loader(4096), loader(1000))
    assert "val/largest_code" in trainer.callback_metrics
    (metrics,) = trainer.test(sae, loader(1000), verbose=False)
    assert metrics["test/largest_code"] == pytest.approx(
        sae.match(activations(1000)).value.max().item()
    )
    assert metrics["test/tokens"] == 1000


def test_the_summary_shows_the_parts_of_the_dictionary():
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
    quiet_trainer().test(train_a_little(sae), loader(128), verbose=False)  # metrics are made
    table = str(ModelSummary(sae))
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if "|" in line}
    assert {"encoder", "decoder"} <= rows.keys()
    assert str(D_MODEL * N_FEATURES + N_FEATURES) in rows["encoder"]
    assert str(D_MODEL * N_FEATURES + D_MODEL) in rows["decoder"]
    assert "Metric" not in table
    assert "other params" not in table


def train_a_little(sae: SparseAutoencoder) -> SparseAutoencoder:
    sae.loss(activations(128))
    return sae


def test_a_child_s_checkpoint_has_unit_norms(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    host = Host()  # whose optimizer step forgets `normalize_decoder`
    trainer.fit(host, loader(2048, torch.randn(2048)))
    trainer.save_checkpoint(tmp_path / "host.ckpt")
    assert (host.sae.decoder.weight.norm(dim=1) - 1).abs().max() > 1e-3
    saved = torch.load(tmp_path / "host.ckpt", weights_only=True)["state_dict"]
    norms = saved["sae.decoder.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(N_FEATURES), atol=1e-6, rtol=0)


def test_predict_returns_matches():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    matches = quiet_trainer().predict(sae, loader(128))
    assert len(matches) == 1
    sae.eval()
    assert torch.equal(matches[0].to_dense(), sae.encode(activations(128)))


def test_a_batch_that_is_not_finite_stops_the_run():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sae.loss(activations())
    bad = TensorDataset(activations(128).fill_(math.inf))
    with pytest.raises(ValueError, match="affinities are not finite after"):
        quiet_trainer(max_steps=3).fit(sae, DataLoader(bad, batch_size=64))
