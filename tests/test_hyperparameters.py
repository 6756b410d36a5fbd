"""Arguments are noted as a module can be made again from them, also by a subclass of it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, TopKSAE
from lightning_sae.hyperparameters import plain


class Fixed(MutualChoiceSAE):
    """An architecture that leaves nothing open of its base but options."""

    def __init__(self, d_model: int, width: float = 2.0, **options: Any) -> None:
        super().__init__(d_model, int(width * d_model), k=3, **options)
        self.save_hyperparameters(ignore=["n_features", "k"])


class Closed(TopKSAE):
    """One that leaves nothing open at all, and does not have to say so."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 24, k=3)


def saved(sae: pl.LightningModule, folder: Path) -> Path:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(sae)
    trainer.save_checkpoint(folder / "sae.ckpt")
    return folder / "sae.ckpt"


def test_numbers_and_paths_are_plain():
    values = [np.int64(3), np.float64(0.5), np.bool_(True), Path("a"), "b", None, 2]
    assert [plain(value) for value in values] == [3, 0.5, True, "a", "b", None, 2]
    assert [type(plain(value)) for value in values[:4]] == [int, float, bool, str]


@pytest.mark.parametrize(
    "arguments",
    [
        {"d_model": np.int64(8), "n_features": np.int32(24), "k": np.int64(3)},
        {"d_model": 8, "n_features": 24, "k": 3, "aux_coefficient": np.float64(0.1)},
        {"d_model": 8, "n_features": 24, "k": 3, "min_matches": np.float32(0.5)},
    ],
)
def test_checkpoints_of_numpy_s_numbers_load(arguments: dict[str, Any], tmp_path: Path):
    path = saved(FeatureChoiceSAE(**arguments), tmp_path)
    found = torch.load(path, weights_only=True)["hyper_parameters"]
    assert all(found[name] == value for name, value in arguments.items())
    loaded = FeatureChoiceSAE.load_from_checkpoint(path)
    assert (loaded.d_model, loaded.n_features, loaded.k) == (8, 24, 3)


class Host(pl.LightningModule):
    """Somebody's module, with arguments of its own of which some are called as ours."""

    def __init__(self, k: int, importance: str = "theirs") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sae = MutualChoiceSAE(8, 24, k=2)


def test_a_part_of_another_module_notes_its_own_arguments(tmp_path: Path):
    host = Host(5)
    assert dict(host.hparams) == {"k": 5, "importance": "theirs"}
    assert dict(host.sae.hparams) == dict(MutualChoiceSAE(8, 24, k=2).hparams)
    host.sae.save_pretrained(tmp_path)
    assert MutualChoiceSAE.from_pretrained(tmp_path).k == 2


def test_one_that_is_made_by_somebody_s_command_line_does_too(monkeypatch):
    monkeypatch.setattr("sys.argv", ["theirs"])
    arguments = ["--model.k=5", "--trainer.accelerator=cpu"]
    options = {"save_config_callback": None, "seed_everything_default": 0}
    made = LightningCLI(Host, args=arguments, run=False, **options).model
    assert dict(made.sae.hparams) == dict(MutualChoiceSAE(8, 24, k=2).hparams)


def test_a_subclass_that_fixes_arguments_is_made_again(tmp_path: Path):
    sae = Fixed(8, width=3.0, dead_after_tokens=5, optimizer=torch.optim.SGD)
    assert not {"n_features", "k", "optimizer", "lr_scheduler"} & sae.hparams.keys()
    again = Fixed.load_from_checkpoint(saved(sae, tmp_path))
    assert (again.n_features, again.history.dead_after_tokens) == (24, 5)
    assert Closed.load_from_checkpoint(saved(Closed(8), tmp_path)).n_features == 24
