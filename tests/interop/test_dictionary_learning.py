"""SAEs in dictionary_learning's format, and, where it is installed, in that library."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sae import GatedSAE, UsageError
from lightning_sae.interop import export, load_foreign, unfold
from tests.helpers.foreign import (
    RECORD,
    as_its_card_says,
    assert_same,
    every_kind,
    refusal,
    there_and_back,
    tokens,
    trained,
)

CLASSES = {
    "standard": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
    "mutual_choice": "BatchTopKSAE",
    "feature_choice_zipf": "JumpReluAutoEncoder",
}


@every_kind
def test_every_architecture_can_leave_and_come_back(kind: str, tmp_path: Path):
    sae = trained(kind, normalize_inputs="average")
    again = there_and_back(sae, "dictionary_learning", tmp_path)
    assert_same(sae, again)
    assert again.record == RECORD
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == CLASSES[kind]
    assert trainer["submodule_name"] == "model.layers.3"


def test_what_it_cannot_say_is_refused(tmp_path: Path):
    told = refusal(trained("mutual_choice"), "dictionary_learning", tmp_path)
    assert "it cannot normalise tokens (normalize_inputs='token'): train with " in told
    sae = trained("mutual_choice", normalize_inputs="average", importance="token_norm")
    told = refusal(sae, "dictionary_learning", tmp_path)
    assert "no thresholds relative to a token's length (importance='token_norm')" in told


def test_what_others_have_written_is_read(tmp_path: Path):
    state = {
        "encoder.weight": torch.randn(24, 16),
        "encoder.bias": torch.randn(24),
        "decoder.weight": torch.nn.functional.normalize(torch.randn(16, 24), dim=0),
        "b_dec": torch.randn(16),
        "k": torch.tensor(3),
        "threshold": torch.tensor(1.5),
    }
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "k": 3, "layer": 8, "lm_name": "someone/model"}
    config = {"trainer": trainer, "buffer": {"ctx_len": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae, x = unfold(load_foreign(f"dictionary_learning:{tmp_path}")), torch.randn(128, 16)
    known = {"model_name": "someone/model", "layer": 8, "context_length": 64}
    assert (sae.k, sae.record["trained_on"]) == (3, known)
    pre = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    expected = (pre * (pre > 1.5)) @ state["decoder.weight"].T + state["b_dec"]
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)


def test_gated_saes_are_read(tmp_path: Path):
    """By the formula of its encoder, written out."""
    shapes = {"encoder.weight": (24, 16), "decoder.weight": (16, 24), "decoder_bias": (16,)}
    shapes |= dict.fromkeys(("gate_bias", "r_mag", "mag_bias"), (24,))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": "GatedAutoEncoder", "trainer_class": "GatedSAETrainer"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    x = tokens()
    products = (x - state["decoder_bias"]) @ state["encoder.weight"].T
    magnitudes = (products * state["r_mag"].exp() + state["mag_bias"]).relu()
    codes = magnitudes * (products + state["gate_bias"] > 0)
    folded = load_foreign(f"dictionary_learning:{tmp_path}")
    torch.testing.assert_close(folded(x)[0], codes, rtol=1e-4, atol=1e-3)
    expected = codes @ state["decoder.weight"].T + state["decoder_bias"]
    sae = unfold(folded, k=4)
    assert type(sae) is GatedSAE
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-2)


def test_what_is_not_read_is_told(tmp_path: Path):
    there_and_back(trained("topk"), "dictionary_learning", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("AutoEncoderTopK", "AutoEncoderNew"))
    with pytest.raises(UsageError, match=r"dict_class='AutoEncoderNew' of config\.json is not"):
        load_foreign(f"dictionary_learning:{tmp_path}")


def test_a_file_that_could_run_code_is_not_read(tmp_path: Path):
    there_and_back(trained("topk"), "dictionary_learning", tmp_path)
    torch.save({"encoder.weight": Path}, tmp_path / "ae.pt")
    with pytest.raises(UsageError, match="is no SAE of dictionary_learning, or is damaged"):
        load_foreign(f"dictionary_learning:{tmp_path}")


@every_kind
def test_dictionary_learning_loads_it(kind: str, tmp_path: Path):
    pytest.importorskip("dictionary_learning")
    found = export(trained(kind, normalize_inputs="average"), "dictionary_learning", tmp_path)
    assert {comparison.by for comparison in found} == {"dictionary_learning"}
    assert as_its_card_says(tmp_path, tokens())["codes"].shape == (len(tokens()), 48)
