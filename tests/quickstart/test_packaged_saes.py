"""The SAEs that ship: found by their names, small, and worth what they say."""

from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, StandardSAE, TopKSAE, load
from lightning_sae.checks import UsageError
from lightning_sae.cli import main
from lightning_sae.data import ActivationDataModule
from lightning_sae.metrics import FractionOfVarianceUnexplained
from lightning_sae.model_card import model_card
from lightning_sae.pretrained import config_of
from lightning_sae.quickstart import SAES, packaged_sae
from notebooks import quickstart_saes

KINDS = {
    "standard": StandardSAE,
    "topk": TopKSAE,
    "mutual_choice": MutualChoiceSAE,
    "feature_choice": FeatureChoiceSAE,
}
every_one = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    data = ActivationDataModule("quickstart", layer=2, validation_tokens=16_384)
    data.prepare_data()
    data.setup("validate")
    return torch.cat([batch["activations"] for batch in data.val_dataloader()])


@every_one
def test_it_is_what_its_record_says(name: str, held_out: torch.Tensor):
    sae = load(f"quickstart/{name}")
    assert type(sae) is KINDS[name]
    assert not sae.training
    assert (sae.d_model, sae.n_features) == (256, 1024)
    measured = sae.record["measured"]
    fvu = FractionOfVarianceUnexplained(256)(sae(held_out), held_out)
    assert float(fvu) == pytest.approx(measured["fvu"], rel=0.1)
    assert len(sae.match(held_out)) / len(held_out) == pytest.approx(measured["l0"], rel=0.1)
    assert measured["l0"] == pytest.approx(16, rel=0.1)
    assert measured["loss_recovered_mean"] > (0.7 if name == "standard" else 0.94)
    trained_on = sae.record["trained_on"]
    assert trained_on["hook_name"] == "transformer.h.2"
    assert trained_on["transformer_lens_hook_name"] == "blocks.2.hook_resid_post"
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-3)


@every_one
def test_its_card_is_that_of_its_record(name: str):
    card = (SAES / name / "README.md").read_text()
    assert "| site, as Hugging Face's module | transformer.h.2 |" in card
    assert card == str(model_card(config_of(SAES / name)))


def test_the_script_that_makes_them_notes_what_their_cards_say(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = partial(ActivationDataModule, batches_per_block=2, validation_tokens=1024)
    monkeypatch.setattr(quickstart_saes, "ActivationDataModule", small)
    monkeypatch.setattr(quickstart_saes, "N_FEATURES", 128)
    monkeypatch.setattr(quickstart_saes, "SAES", tmp_path / "saes")
    monkeypatch.setattr(quickstart_saes, "STEPS", 2)
    quickstart_saes.main()
    for name in KINDS:  # all but the first of them find their activations in a cache
        sae = load(tmp_path / "saes" / name)
        assert sae.record["trained_on"]["hook_name"] == "transformer.h.2"
        measured = sae.record["measured"]
        assert measured.keys() >= {"l0_in_training", "l0", "fvu", "loss_recovered_mean"}
        assert sae.encoder.weight.equal(sae.encoder.weight.half().float())


def test_together_they_are_small():
    assert {folder.name for folder in SAES.iterdir()} == KINDS.keys()
    assert sum(file.stat().st_size for file in SAES.rglob("*")) < 6e6


def test_a_class_finds_its_own():
    sae = TopKSAE.from_pretrained("quickstart/topk")
    assert sae.k == 16
    with pytest.raises(ValueError, match="is a TopKSAE, not a MutualChoiceSAE"):
        MutualChoiceSAE.from_pretrained("quickstart/topk")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert packaged_sae("quickstart/topk") == SAES / "topk"
    with pytest.raises(UsageError, match=r"^quickstart/topkk is none of .*quickstart/topk$"):
        packaged_sae("quickstart/topkk")
    assert packaged_sae("quickstart") == "quickstart"
    Path("quickstart/topk").mkdir(parents=True)
    assert packaged_sae("quickstart/topk") == "quickstart/topk"


@pytest.mark.filterwarnings("ignore:Measured with what is in the checkpoint")
def test_a_command_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["--config=feature_choice.yaml", "--ckpt_path=quickstart/feature_choice"]
    small = ["--data.test_tokens=2048", "--trainer.logger=false"]
    table = {"class_path": "lightning_sae.callbacks.ResultsTable"}
    main(["test", *line, *small, f"--trainer.callbacks=[{table}]"])
    assert "fvu" in capsys.readouterr().out
    main(["export", "--ckpt_path=quickstart/topk", "--to=openmoss", "--output=out", "--tokens=512"])
    assert "out is for openmoss." in capsys.readouterr().out
