"""`lightning_sae report` as a user meets it."""

import json
from pathlib import Path

import pytest

from lightning_sae import SparseAutoencoder, TopKSAE
from lightning_sae.cli import main
from lightning_sae.interop import export
from tests.data.tiny import LENGTH, save_model
from tests.report.test_page import data_in
from tests.report.tiny_sae import trained_in


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SparseAutoencoder:
    return trained_in(tmp_path, monkeypatch)[0]


@pytest.fixture
def folder(sae: SparseAutoencoder, tmp_path: Path) -> str:
    sae.save_pretrained(tmp_path / "sae")
    return str(tmp_path / "sae")


def test_a_page_and_tables(folder: str, tmp_path: Path, capsys):
    page = tmp_path / "report.html"
    main(["report", f"--ckpt_path={folder}", f"--output={page}", f"--tokens={6 * LENGTH}"])
    shown = data_in(page.read_text())
    assert shown["title"] == "TopKSAE on layer 1 of model"
    assert len(shown["count"]) == 24
    printed = capsys.readouterr().out
    assert all(path.name in printed for path in tmp_path.glob("report.*"))
    assert len(list(tmp_path.glob("report.*"))) == 3


def test_files_for_neuronpedia(folder: str, tmp_path: Path, capsys):
    output = tmp_path / "out"
    line = [f"--ckpt_path={folder}", "--format=neuronpedia", f"--output={output}"]
    main(["report", *line, f"--tokens={6 * LENGTH}"])
    assert str(output / "batch-0.json") in capsys.readouterr().out
    batch = json.loads((output / "batch-0.json").read_text())
    assert batch["layer"] == 1
    assert batch["model_id"] == "model"
    assert len(batch["features"]) == 24
    assert "out holds files already" in refused(*line, capsys=capsys)


def test_neuronpedia_is_refused_for_a_layer_without_a_number(folder: str, tmp_path: Path, capsys):
    config = tmp_path / "sae" / "config.json"
    noted = json.loads(config.read_text())
    noted["trained_on"]["layer"] = path = "gpt_neox.layers.1"
    config.write_text(json.dumps(noted))
    line = [f"--ckpt_path={folder}", "--format=neuronpedia", f"--output={tmp_path / 'out'}"]
    assert f"layer='{path}'" in refused(*line, f"--tokens={6 * LENGTH}", capsys=capsys)


def test_a_model_that_has_moved_can_be_named(folder: str, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    (tmp_path / "model").rename(moved)
    page = tmp_path / "report.html"
    line = ["report", f"--ckpt_path={folder}", f"--output={page}", f"--tokens={6 * LENGTH}"]
    main([*line, f"--model_name={moved}", "--split=train"])
    assert data_in(page.read_text())["title"] == "TopKSAE on layer 1 of elsewhere"


@pytest.mark.parametrize("kind", ["folder", "foreign"])
def test_what_an_sae_does_not_note_can_be_said(tmp_path: Path, kind: str):
    sae, path = TopKSAE(256, 24, 3, normalize_inputs="average").eval(), str(tmp_path / "sae")
    if kind == "folder":
        sae.save_pretrained(path)
    else:
        export(sae, "sparsify", path)
        path = f"sparsify:{path}"
    page = tmp_path / "report.html"
    line = ["report", f"--ckpt_path={path}", f"--output={page}", "--tokens=256"]
    main([*line, "--model_name=quickstart", "--text=quickstart", "--layer=2"])
    assert data_in(page.read_text())["title"] == "TopKSAE on layer 2 of quickstart"


def refused(*line: str, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["report", *line])
    printed = capsys.readouterr().err
    return printed if isinstance(exit_.value.code, int) else str(exit_.value.code)


def test_mistakes_are_told_in_a_line_before_anything_is_read(folder, sae, tmp_path, capsys):
    given = f"--ckpt_path={folder}"
    page = f"--output={tmp_path / 'report.html'}"
    assert "report.pdf must be a file" in refused(given, "--output=report.pdf", capsys=capsys)
    assert "there is no folder nowhere" in refused(given, "--output=nowhere/a.html", capsys=capsys)
    assert "tokens=1 must be at least" in refused(given, page, "--tokens=1", capsys=capsys)
    assert "split" in refused(given, page, "--split=test", capsys=capsys)
    assert "nothing.ckpt" in refused("--ckpt_path=nothing.ckpt", page, capsys=capsys)
    assert "ckpt_path" in refused(page, capsys=capsys)
    other = save_model(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert "the checkpoint was trained on" in refused(
        given, page, f"--model_name={other}", capsys=capsys
    )
    sae.record = {}
    sae.save_pretrained(folder)
    every = "does not note all of what the SAE was trained on: say --model_name, --layer, --text"
    assert every in refused(given, page, capsys=capsys)
    text = f"--text={tmp_path / 'text.jsonl'}"
    told = refused(given, page, text, f"--model_name={other}", capsys=capsys)
    assert "was trained on: say --layer" in told
    wider = ["--model_name=quickstart", "--layer=2", text]
    assert "256 wide, and ckpt_path=" in refused(given, page, *wider, capsys=capsys)
    sae.record = {"trained_on": {"model_name": "vit", "layer": 1, "images": "folder"}}
    sae.save_pretrained(folder)
    assert "this SAE was trained on images" in refused(given, page, *wider, capsys=capsys)
    assert not list(tmp_path.glob("report.*"))


def test_help_tells_of_its_arguments(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["report", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "--ckpt_path" in printed
    assert "--tokens" in printed
