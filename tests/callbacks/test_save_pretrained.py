"""A folder that others can load, beside the checkpoints."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import ActivationDataModule, MutualChoiceSAE, SavePretrained, TopKSAE, load
from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.temporary import temporary_of
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations
from tests.test_temporary import of_a_killed_process

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def trainer(folder: Path, *callbacks: pl.Callback, steps: int = 3, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=CSVLogger(folder, name="runs"),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def loader(tokens: int = 512) -> DataLoader:
    return DataLoader(TensorDataset(activations(tokens)), batch_size=128)


class Watching(SavePretrained):
    """Notes what lies in the folder after each save."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def _save(self, trainer, pl_module):
        folders = super()._save(trainer, pl_module)
        self.seen += [int(load(folder).tokens_seen) for folder in folders]
        return folders


def test_it_is_as_fresh_as_the_checkpoints(tmp_path: Path):
    torch.manual_seed(0)
    watching, sae = Watching(), MutualChoiceSAE(D_MODEL, N_FEATURES, K)
    run = trainer(tmp_path, watching, ModelCheckpoint(every_n_train_steps=2), steps=3)
    run.fit(sae, loader())
    assert watching.seen == [2 * 128, 3 * 128]
    folder = Path(run.log_dir, "pretrained")
    assert torch.equal(load(folder)(activations()), sae(activations()))
    assert sorted(path.name for path in Path(run.log_dir).iterdir() if path.is_dir()) == [
        "checkpoints",
        "pretrained",
    ]


def test_what_is_known_of_the_training_is_in_it(tmp_path: Path):
    torch.manual_seed(0)
    data = ActivationDataModule(
        "quickstart", 1, batch_size=256, batches_per_block=2, validation_tokens=1024
    )
    sae = MutualChoiceSAE(data.d_model, 64, 4)
    run = trainer(
        tmp_path,
        SavePretrained(tmp_path / "sae"),
        LossRecoveredCallback(tokens=256),
        ModelCheckpoint(every_n_train_steps=2),
        steps=2,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    run.fit(sae, datamodule=data)
    record = load(tmp_path / "sae").record
    assert sae.record == record
    assert (
        record["trained_on"].items()
        >= {
            "model_name": "quickstart",
            "layer": 1,
            "hook_name": "transformer.h.1",
            "transformer_lens_hook_name": "blocks.1.hook_resid_post",
            "text": "quickstart",
            "context_length": 128,
        }.items()
    )
    assert record["trained_on"]["positions"].startswith("all but special tokens")
    measured = {name: value.item() for name, value in run.callback_metrics.items()}
    for name in ("fvu", "l0", "dead_fraction", "loss_recovered_mean"):
        assert record["measured"][name] == measured[f"val/{name}"]
    assert record["measured"]["l0_in_training"] == measured["train/l0"]
    assert record["measured"]["tokens_seen"] == 2 * 256
    card = (tmp_path / "sae" / "README.md").read_text()
    assert "| site, as Hugging Face's module | transformer.h.1 |" in card
    assert f"(FVU) | {measured['val/fvu']:.4g} |" in card
    (path,) = Path(run.log_dir).rglob("*.ckpt")
    noted = load(path).record  # before the validation of that step
    assert noted["trained_on"] == record["trained_on"]
    assert "measured" not in noted


def test_what_killed_runs_left_is_removed(tmp_path: Path):
    beside = tmp_path / ".sae"
    left, running = of_a_killed_process(beside), temporary_of(beside)
    for folder in (left, running, mine := tmp_path / ".sae.old"):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    run = trainer(tmp_path, SavePretrained(tmp_path / "sae"), enable_checkpointing=False)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    assert set(tmp_path.glob(".sae*")) == {running, mine}


class Own(pl.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/own", float(trainer.global_step))


def test_a_checkpoint_of_a_validation_has_its_figures(tmp_path: Path):
    best = ModelCheckpoint(monitor="val/own", mode="max", save_top_k=-1, filename="{step}")
    run = trainer(tmp_path, Own(), best, steps=4, val_check_interval=2, num_sanity_val_steps=0)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader(), loader(256))
    found = {
        int(path.stem.removeprefix("step=")): load(path).record
        for path in Path(run.log_dir).rglob("step=*.ckpt")
    }
    assert {step: record["measured"]["own"] for step, record in found.items()} == {2: 2, 4: 4}
    assert found[4]["measured"]["tokens_seen"] == 4 * 128
    assert found[2]["measured"]["fvu"] != found[4]["measured"]["fvu"]


class Numberless(DummyLogger):
    """A logger that has no folder for each run, as most have none."""

    save_dir = "everywhere"


def test_runs_whose_logger_has_no_folder_for_each_do_not_share_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        run = trainer(tmp_path, SavePretrained(), ModelCheckpoint(f"runs/{name}"))
        run._loggers = [Numberless()]
        run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("pretrained"))
    assert found == ["runs/first/pretrained", "runs/second/pretrained"]


def test_what_was_only_tried_is_not_saved(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, SavePretrained(tmp_path / "out"), fast_dev_run=2)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    assert not (tmp_path / "out").exists()


class WithDtype(TopKSAE):
    def __init__(self, d_model: int, n_features: int, k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, n_features, k)


@pytest.mark.filterwarnings("ignore:Skipping 'dtype' parameter")  # the logger's YAML cannot either
def test_an_argument_that_json_cannot_say_does_not_end_the_run(tmp_path: Path):
    run = trainer(tmp_path, SavePretrained(), ModelCheckpoint(every_n_train_steps=2))
    with pytest.warns(UserWarning, match="An argument of WithDtype keeps it unsaved"):
        run.fit(WithDtype(D_MODEL, N_FEATURES, K, torch.float32), loader())
    assert list(Path(run.log_dir).rglob("*.ckpt"))
    endless = TopKSAE(D_MODEL, N_FEATURES, K, max_norm_multiple=float("inf"))
    endless.loss(activations())
    endless.save_pretrained(tmp_path / "endless")
    assert load(tmp_path / "endless").max_norm_multiple == float("inf")


class Host(pl.LightningModule):
    """Somebody else's module, with SAEs among its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.saes = nn.ModuleDict({"early": TopKSAE(D_MODEL, N_FEATURES, K)})
        self.late = TopKSAE(D_MODEL, 2 * N_FEATURES, K)

    def training_step(self, batch):
        return sum(sae.loss(batch[0])[0] for sae in (self.saes["early"], self.late))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_saes_in_another_module_are_saved_each(tmp_path: Path):
    host = Host()
    trainer(tmp_path, SavePretrained(tmp_path / "out"), enable_checkpointing=False).fit(
        host, loader()
    )
    for name, sae in (("saes/early", host.saes["early"]), ("late", host.late)):
        # Its own loop has left the decoder without unit norms.
        torch.testing.assert_close(load(tmp_path / "out" / name)(activations()), sae(activations()))


def test_a_run_without_a_step_leaves_nothing(tmp_path: Path):
    run = trainer(tmp_path, SavePretrained(), steps=0)
    run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    assert not list(tmp_path.rglob("pretrained"))


def test_the_user_is_told_where_it_lies(tmp_path: Path, caplog):
    run = trainer(tmp_path, SavePretrained(), enable_checkpointing=False)
    with caplog.at_level("INFO"):
        run.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    told = [record.message for record in caplog.records if "lightning_sae.load" in record.message]
    folder = Path(run.log_dir, "pretrained")
    assert told == [f"The SAE is in {folder}: lightning_sae.load({str(folder)!r})"]
    assert json.loads((folder / "config.json").read_text())["architecture"] == "TopKSAE"
