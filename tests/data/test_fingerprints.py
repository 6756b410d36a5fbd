from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lightning_sae.data.fingerprints import commit_of, model_fingerprint
from lightning_sae.data.language_model import LanguageModel


def test_fingerprint_of_a_folder_is_that_of_its_weights(model_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        (copy / file).write_bytes((model_folder / file).read_bytes())
    original = model_fingerprint(str(model_folder), "main")
    assert len(original) == 16
    assert model_fingerprint(str(copy), "main") == original
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(str(copy), "main") != original


def test_fingerprint_of_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--gpt"
    for folder in ("refs", "snapshots/abc", "snapshots/def"):
        (repository / folder).mkdir(parents=True)
    for commit in ("abc", "def"):
        (repository / "snapshots" / commit / "config.json").write_text("{}")

    def fingerprint(revision: str, name: str = "someone/gpt") -> str:
        return model_fingerprint(name, revision)

    (repository / "refs" / "main").write_text("abc")
    (repository / "refs" / "v2").write_text("abc")
    first = fingerprint("main")
    assert fingerprint("v2") == fingerprint("abc") == first
    (repository / "refs" / "main").write_text("def")  # the branch has moved
    assert fingerprint("main") == fingerprint("def") != first
    assert fingerprint("main", "else/gpt") != fingerprint("v3", "else/gpt")  # not there: by name
    assert commit_of("else/gpt", "v3") == "v3"
    assert commit_of("of my own", "main") == "main"

    def noted(revision: str | None) -> str | None:
        return LanguageModel("someone/gpt", 1, revision=revision).names_elsewhere["model_revision"]

    assert noted(None) == noted("main") == "def"
    assert noted("v2") == "v2"
