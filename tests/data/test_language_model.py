import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_sae.data.language_model import LanguageModel
from tests.data.tiny import D_MODEL, POSITIONS, save_model

CPU = torch.device("cpu")


def language_model(name, layer=1, dtype="float32"):
    return LanguageModel(str(name), layer, revision=None, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_frozen_in_eval_mode_and_of_the_dtype(model_folder, dtype):
    stream = language_model(model_folder, dtype=dtype).residual_stream(CPU)
    assert not stream.model.training
    assert not any(p.requires_grad for p in stream.model.parameters())
    assert {p.dtype for p in stream.model.parameters()} == {getattr(torch, dtype)}
    assert stream.layer == 1
    assert stream.d_model == D_MODEL


def test_it_is_loaded_once_and_only_when_read(model_folder, monkeypatch):
    calls = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        calls.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = language_model(model_folder)
    assert model.config.hidden_size == D_MODEL
    read = model.reader(CPU, None)
    model.tokenizer(8)
    assert not calls
    ids = torch.zeros(2, 3).long()
    assert torch.equal(read(ids), model.residual_stream(CPU).read(ids))
    assert len(calls) == 1
    assert calls[0]["use_safetensors"]


def test_weights_loaded_or_moved_in_inference_mode_can_be_trained_through(model_folder):
    model = language_model(model_folder)
    weight = torch.ones(D_MODEL, requires_grad=True)
    with torch.inference_mode():
        stream = model.residual_stream(CPU)
    stream.replace(torch.zeros(1, 3).long(), lambda x: x * weight).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        stream = model.residual_stream(torch.device("meta"))
    assert stream.device.type == "meta"
    assert not any(p.is_inference() for p in stream.model.parameters())


def test_the_packaged_model():
    model = language_model("quickstart")
    assert model.residual_stream(CPU).read(torch.zeros(1, 4).long()).isfinite().all()
    assert len(model.tokenizer(128)) <= model.config.vocab_size


def test_cached_activations_are_told_apart_by_model_layer_and_dtype(model_folder, tmp_path):
    ids = torch.zeros(2, 3).long()
    other = tmp_path / "model"
    shutil.copytree(model_folder, other)
    weights = AutoModelForCausalLM.from_pretrained(other)
    weights.transformer.h[0].ln_1.weight.data += 1
    weights.save_pretrained(other)
    variants = {
        "first": {"name": model_folder},
        "layer": {"name": model_folder, "layer": 0},
        "dtype": {"name": model_folder, "dtype": "bfloat16"},
        "weights": {"name": other},
    }
    for _ in range(2):
        for variant in variants.values():
            model = language_model(**variant)
            activations = model.reader(CPU, str(tmp_path / "cache"))(ids)
            assert torch.equal(activations, model.residual_stream(CPU).read(ids))
    folders = sorted(folder.name for folder in (tmp_path / "cache").iterdir())
    assert len(folders) == 4
    assert all(len(list((tmp_path / "cache" / name).iterdir())) == 1 for name in folders)
    assert any(name.startswith(f"{model_folder.name}-layer-1-float32-") for name in folders)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "^model_name='nope': We couldn't connect to 'https://huggingface.co'"),
        ("no/such", "^model_name='no/such': We couldn't connect to 'https://huggingface.co'"),
        ("./nope", r"^model_name='./nope': there is no such folder$"),
        ("bad name!", r"^model_name='bad name!': Repo id must use"),
    ],
)
def test_no_such_model(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        _ = language_model(name).config
    assert "\n" not in str(caught.value)


def test_incomplete_folders(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model = language_model(folder)
    with pytest.raises(ValueError, match=r"^model_name='.*model': .* no file named model.safet"):
        model.residual_stream(CPU)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"^model_name='.*model': there is no tokenizer$"):
        model.tokenizer(8)
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match=r"^model_name='.*model': The checkpoint .* `nothing`"):
        _ = language_model(folder).config


def test_layers_and_lengths_the_model_has_not(model_folder):
    with pytest.raises(ValueError, match=r"^layer=3 is out of range: .* has layers 0 to 2$"):
        _ = language_model(model_folder, layer=3).config
    model = language_model(model_folder)
    model.tokenizer(POSITIONS)
    message = rf"^context_length={POSITIONS + 1}: model_name='.*' reads up to {POSITIONS}$"
    with pytest.raises(ValueError, match=message):
        model.tokenizer(POSITIONS + 1)


def test_tokens_the_model_has_not(model_folder):
    read = language_model(model_folder).reader(CPU, None)
    read(torch.tensor([[0, 319]]))
    message = r"^model_name='.*': the tokenizer gives the token 320, the model knows 320$"
    with pytest.raises(ValueError, match=message):
        read(torch.tensor([[0, 320]]))
