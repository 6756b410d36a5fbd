"""Files of tensors: whole or not there, and as readable as any other."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lightning_sae import tensor_files
from lightning_sae.tensor_files import save_tensors


def test_what_is_saved_comes_back(tmp_path: Path):
    table = torch.arange(12.0).view(3, 4)
    tensors = {"whole": table, "column": table[:, 1], "turned": table.T, "none": torch.ones(0, 2)}
    save_tensors(tensors, tmp_path / "a.safetensors", shape="[3, 4]")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"shape": "[3, 4]"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_who_may_read_other_files_may_read_it(tmp_path: Path):
    (tmp_path / "other").touch()
    save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_it_is_given_its_name_when_complete(tmp_path: Path, monkeypatch):
    def save(tensors, filename, metadata):
        save_file(tensors, filename, metadata)
        assert [each.suffix for each in tmp_path.iterdir()] == [".partial"]

    monkeypatch.setattr(tensor_files, "save_file", save)
    save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_what_was_there_stays_if_it_cannot_be_written(tmp_path: Path, monkeypatch, error):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(1)}, path)

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise error("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write '.*a\.safetensors': No space left"):
        save_tensors({"a": torch.zeros(1)}, path)
    assert load_file(path)["a"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
