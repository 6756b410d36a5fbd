from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_sae.data.cache import ActivationCache, model_fingerprint

CPU = torch.device("cpu")


class Reader:
    """Random activations, counted."""

    def __init__(self, dtype=torch.float32):
        self.calls = 0
        self.dtype = dtype

    def __call__(self, input_ids):
        self.calls += 1
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        return torch.randn(*input_ids.shape, 5, generator=generator).to(self.dtype)


def cached(reader, folder):
    return ActivationCache(reader, folder, CPU, lambda ids: (*ids.shape, 5), reader.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_once_is_not_read_again(tmp_path, dtype):
    reader = Reader(dtype)
    ids = torch.arange(6).view(2, 3)
    first = cached(reader, tmp_path / "new" / "folder")(ids)
    again = cached(reader, tmp_path / "new" / "folder")(ids)
    assert reader.calls == 1
    assert again.dtype == dtype
    assert torch.equal(first, again)
    assert torch.equal(first, Reader(dtype)(ids))
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert torch.equal(load_file(file)["activations"], first)


def test_other_tokens_and_shapes_are_other_files(tmp_path):
    reader = Reader()
    cache = cached(reader, tmp_path)
    ids = torch.arange(6)
    for other in (ids.view(2, 3), ids.view(3, 2), ids.flip(0).view(2, 3), ids.view(3, 2).T):
        assert cache(other).shape == (*other.shape, 5)
    assert reader.calls == 4
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "short", "long", "garbage", "other"])
def test_damaged_files(tmp_path, damage):
    cache = cached(Reader(), tmp_path)
    ids = torch.arange(6).view(2, 3)
    whole = cache(ids)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "other":
        save_file({"something": whole}, file)
    else:
        changed = {
            "empty": b"",
            "short": content[:-3],
            "long": content + b"x",
            "garbage": b"7" * 99,
        }
        file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"^cache_dir: .* is damaged .*; delete it,") as caught:
        cache(ids)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    file.unlink()
    assert torch.equal(cache(ids), whole)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[:, :2], r"torch.float32 of shape \(2, 2, 5\)"),
        (lambda x: x[..., :4], r"torch.float32 of shape \(2, 3, 4\)"),
        (lambda x: x[0, 0, 0], r"torch.float32 of shape \(\)"),
        (lambda x: x.half(), r"torch.float16 of shape \(2, 3, 5\)"),
        (lambda x: x.long(), r"torch.int64 of shape \(2, 3, 5\)"),
    ],
)
def test_a_file_of_another_shape_or_type_is_not_taken(tmp_path, change, told):
    cache = cached(Reader(), tmp_path)
    ids = torch.arange(6).view(2, 3)
    whole = cache(ids)
    (file,) = tmp_path.iterdir()
    save_file({"activations": change(whole).contiguous()}, file)
    expected = rf"^cache_dir: .* holds {told} instead of .*float32 of shape \(2, 3, 5\); delete it,"
    with pytest.raises(ValueError, match=expected) as caught:
        cache(ids)
    assert str(file) in str(caught.value)


def test_a_residual_stream_wider_than_the_model_s_type_is_taken(tmp_path):
    reader = Reader()
    ids = torch.arange(6).view(2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        cache = ActivationCache(reader, tmp_path, CPU, lambda ids: (*ids.shape, 5), dtype)
        assert cache(ids).dtype == torch.float32
    assert reader.calls == 1


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def full(_tensors, file, metadata):
        file.write_bytes(b"the first part")
        raise error("No space left on device")

    monkeypatch.setattr("lightning_sae.tensor_files.save_file", full)
    with pytest.raises(
        ValueError, match=r"^cache_dir: cannot write '.*': No space left on device$"
    ):
        cached(Reader(), tmp_path)(torch.zeros(1, 2).long())
    assert not list(tmp_path.iterdir())


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
