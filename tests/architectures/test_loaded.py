"""Trained SAEs found by what their files say."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import MutualChoiceSAE, TopKSAE, load
from lightning_sae.architectures import loaded
from lightning_sae.checks import UsageError
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class HalvedSAE(TopKSAE):
    """Somebody's own architecture."""


def checkpoint(sae, path: Path) -> Path:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(sae, DataLoader(TensorDataset(activations(256)), batch_size=128))
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("kind", [TopKSAE, MutualChoiceSAE, HalvedSAE])
def test_a_checkpoint_says_of_which_class_it_is(kind, tmp_path: Path):
    torch.manual_seed(0)
    sae = kind(D_MODEL, N_FEATURES, K)
    found = load(checkpoint(sae, tmp_path / "last.ckpt"))
    assert type(found) is kind
    assert not found.training
    assert torch.equal(found(activations()), sae(activations()))


def test_a_checkpoint_of_format_1_is_loaded():
    assert isinstance(load(Path(__file__).parents[1] / "checkpoints_format_1/topk.ckpt"), TopKSAE)


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(UsageError, match="is no checkpoint of an SAE"):
        load(Path(__file__).parents[1] / "checkpoints_format_1/child.ckpt")


def test_a_folder_that_holds_an_sae_further_in_is_told_of_it(tmp_path: Path):
    """As that of a run does, which the path of a checkpoint begins with."""
    inner = tmp_path / "version_0" / "pretrained"
    TopKSAE(D_MODEL, N_FEATURES, K).save_pretrained(inner)
    for outer in (tmp_path, tmp_path / "version_0"):
        with pytest.raises(UsageError) as refused:
            load(outer)
        told = f"{outer} has no config.json of an SAE, did you mean '{inner}'?"
        assert str(refused.value) == told


@pytest.mark.parametrize(
    "path", ["nowhere/last.ckpt", "./nowhere", "/nowhere/at_all", "a/b/c", "~/nowhere"]
)
def test_what_can_be_no_id_on_the_hub_is_not_asked_for_there(path, monkeypatch):
    monkeypatch.setattr(loaded, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match="there is no such file or folder"):
        load(path)
