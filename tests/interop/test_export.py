"""What is written for others is compared before anyone relies on it."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from lightning_sae import UsageError
from lightning_sae.cli import main
from lightning_sae.interop import FORMATS, export, fold, saelens
from lightning_sae.interop.export import compare
from tests.helpers.foreign import refusal, tokens, trained


def test_random_and_real_activations_are_compared(tmp_path: Path):
    sae, x = trained("mutual_choice"), tokens()
    random, real = export(sae, "saelens", tmp_path / "out", x)
    assert (random.name, real.name) == ("random activations", "real activations")
    assert (random.tokens, real.tokens) == (1024, 512)
    torch.testing.assert_close(real.l0[0], (sae.encode(x) > 0).sum().item() / len(x))
    fvu = (((x - sae(x)) ** 2).mean() / ((x - x.mean(0)) ** 2).mean()).item()
    torch.testing.assert_close(real.fvu, (fvu, fvu), rtol=1e-4, atol=0)
    assert "512 tokens: largest error" in str(real)


@pytest.mark.parametrize("to", FORMATS)
def test_a_card_says_what_it_is_and_how_it_is_loaded(to: str, tmp_path: Path):
    export(trained("topk"), to, tmp_path)
    card, library = ModelCard.load(tmp_path / "README.md"), FORMATS[to].LIBRARY
    assert card.data.library_name == library
    assert card.data.base_model == "someone/model"
    for line in (
        f"A sparse autoencoder, trained with `lightning_sae`, in the format of `{library}`",
        "codes = sae.encode(activations)",
        "| expected matches per token (k) | 4 |",
        "| site, as Hugging Face's module | model.layers.3 |",
        "| site, as TransformerLens calls it | blocks.3.hook_resid_post |",
        "| positions | all but the first |",
        "| features that fire on a token, in inference | 4 |",
        "| share of the activations' variance not reconstructed (FVU) | 0.2 |",
        "| language model's loss recovered, against mean ablation | 0.9 |",
    ):
        assert f"\n{line}" in card.text
    assert "import lightning_sae" not in card.text


SHIPPED = [(name, False) for name in ("standard", "topk", "mutual_choice", "feature_choice")]
SHIPPED += [("mutual_choice", True), ("feature_choice", True)]


@pytest.mark.parametrize(("name", "without"), SHIPPED)
def test_what_ships_is_exported_to_saelens(name, without, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["export", f"--ckpt_path=quickstart/{name}", "--to=saelens", "--output=out"]
    main([*line, "--tokens=2048", f"--without_discount={str(without).lower()}"])
    told = capsys.readouterr().out.splitlines()
    discounts = name in ("mutual_choice", "feature_choice") and not without
    assert told[-1] == "out is for saelens."
    assert any("--without_discount=true" in line for line in told) == discounts
    compared = [line for line in told if "largest error" in line]
    by = "saelens" if find_spec("sae_lens") else "our reading of its files"
    for each, on in zip(compared, ("random", "real"), strict=True):
        assert each.startswith(f"{on} activations, ")
        assert f" by {by}; " in each
        assert float(re.search("largest error (.*) of their spread", each)[1]) < 1e-5
    card = Path("out/README.md").read_text()
    assert "| site, as Hugging Face's module | transformer.h.2 |" in card
    assert "(FVU) | 0." in card
    assert ("saelens_adapter" in card) == discounts
    assert "loss recovered" in card


def test_what_is_not_the_same_there_is_refused(tmp_path: Path, monkeypatch):
    read = saelens.read

    def slightly_off(folder: Path):
        folded = read(folder)
        folded.encoder_bias[3] += 0.5
        return folded

    monkeypatch.setattr(saelens, "read", slightly_off)
    monkeypatch.setattr(saelens, "run", lambda folder: None)
    told = refusal(trained("standard"), "saelens", tmp_path)
    assert told.startswith("to=saelens: it is not the same there. random activations, 1,024 tokens")


def test_only_what_rounding_can_change_counts_as_a_tie():
    sae, x = trained("mutual_choice"), tokens()
    folded = fold(sae)

    def with_cuts(shift: float):
        affinities, cut = folded.affinities(x)
        codes = affinities.where(affinities > cut * (1 + shift), 0)
        lengths = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        return lambda _: (codes, (codes @ folded.decoder_weight + folded.decoder_bias) * lengths)

    assert compare(sae, with_cuts(0.0), x).error < 1e-5
    barely, far = compare(sae, with_cuts(1e-7), x), compare(sae, with_cuts(0.5), x)
    assert barely.error < 1e-5
    assert far.error > 1e-2
    assert far.l0[1] < far.l0[0]


def test_files_of_someone_are_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(UsageError, match=r"output=.* holds files already"):
        export(trained("topk"), "saelens", tmp_path)
    assert (tmp_path / "mine").read_text() == "text"


def test_formats_are_known_by_name(tmp_path: Path):
    assert set(FORMATS) == {"saelens", "sparsify", "dictionary_learning", "openmoss"}
    with pytest.raises(UsageError, match="to='other' is none of saelens, sparsify, "):
        export(trained("topk"), "other", tmp_path)
