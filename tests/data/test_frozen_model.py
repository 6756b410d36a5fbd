"""What all frozen models do, seen on a language model."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_sae.checks import UsageError
from lightning_sae.data import frozen_model as frozen_model_file
from lightning_sae.data.language_model import LanguageModel
from tests.data.tiny import D_MODEL

CPU = torch.device("cpu")


def frozen_model(name, layer=1, dtype="float32"):
    return LanguageModel(str(name), layer, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_frozen_in_eval_mode_and_of_the_dtype(model_folder, dtype):
    stream = frozen_model(model_folder, dtype=dtype).residual_stream(CPU)
    assert not stream.model.training
    assert not any(p.requires_grad for p in stream.model.parameters())
    assert {p.dtype for p in stream.model.parameters()} == {getattr(torch, dtype)}
    assert stream.layer == 1
    assert stream.d_model == D_MODEL == frozen_model(model_folder).d_model


def test_it_is_loaded_once_and_only_when_read(model_folder, monkeypatch):
    calls = []
    load = GPT2LMHeadModel.from_pretrained

    def from_pretrained(*args, **kwargs):
        calls.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", from_pretrained)
    model = frozen_model(model_folder)
    assert model.d_model == D_MODEL
    read = model.reader(CPU)
    assert not calls
    ids = torch.zeros(2, 3).long()
    assert torch.equal(read(ids), model.residual_stream(CPU).read(ids))
    assert len(calls) == 1
    assert calls[0]["use_safetensors"]


def test_weights_loaded_or_moved_in_inference_mode_can_be_trained_through(model_folder):
    model = frozen_model(model_folder)
    weight = torch.ones(D_MODEL, requires_grad=True)
    with torch.inference_mode():
        stream = model.residual_stream(CPU)
    stream.replace(torch.zeros(1, 3).long(), lambda x: x * weight).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        stream = model.residual_stream(torch.device("meta"))
    assert stream.device.type == "meta"
    assert not any(p.is_inference() for p in stream.model.parameters())


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
            model = frozen_model(**variant)
            activations = model.reader(CPU, str(tmp_path / "cache"))(ids)
            model.write_caches()
            assert torch.equal(activations, model.residual_stream(CPU).read(ids))
    folders = sorted(folder.name for folder in (tmp_path / "cache").iterdir())
    assert len(folders) == 4
    assert all(len(list((tmp_path / "cache" / name).iterdir())) == 1 for name in folders)
    assert any(name.startswith(f"{model_folder.name}-layer-1-float32-") for name in folders)


@pytest.mark.parametrize("changed", [lambda x: x.double(), lambda x: x[:, :2].contiguous()])
def test_a_cached_file_that_the_model_cannot_have_written_is_refused(
    model_folder, tmp_path, changed
):
    ids = torch.zeros(2, 3).long()
    model = frozen_model(model_folder)
    model.reader(CPU, str(tmp_path))(ids)
    model.write_caches()
    (file,) = tmp_path.rglob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"activations": changed(tensors["activations"])}, file)
    again = frozen_model(model_folder).reader(CPU, str(tmp_path))
    message = rf"^cache_dir: a file in {file.parent} holds .* \(3, {D_MODEL}\); delete it"
    with pytest.raises(UsageError, match=message):
        again(ids)


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
        _ = frozen_model(name).config
    assert "\n" not in str(caught.value)


def test_arguments_out_of_range(model_folder):
    with pytest.raises(ValueError, match=r"^layer=-1 must be at least 0$"):
        frozen_model(model_folder, layer=-1)
    message = r"^model_dtype='int8' must be one of float32, bfloat16, float16$"
    with pytest.raises(ValueError, match=message):
        frozen_model(model_folder, dtype="int8")
    with pytest.raises(ValueError, match=r"^layer=3 is out of range: .* has layers 0 to 2$"):
        _ = frozen_model(model_folder, layer=3).config


def test_threads_load_the_model_once(model_folder, monkeypatch):
    """Transformers changes what all threads see while it loads one."""
    model, loaded = frozen_model(model_folder), []
    load = model.load
    monkeypatch.setattr(model, "load", lambda: loaded.append(time.sleep(0.2)) or load())
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(model.residual_stream, CPU) for _ in range(2)]
    assert streams[0].result() is streams[1].result()
    assert len(loaded) == 1


class OwnModel(LanguageModel):
    """Has its weights from no file, but from a seed."""

    def __init__(self, seed):
        super().__init__("of my own", layer=1)
        self.seed, self.loaded = seed, 0

    @cached_property
    def config(self):
        return GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32)

    def load(self):
        self.loaded += 1
        torch.manual_seed(self.seed)
        return GPT2LMHeadModel(self.config)


def test_weights_that_are_in_no_file_are_told_apart_too(tmp_path):
    model, same, other = OwnModel(0), OwnModel(0), OwnModel(1)
    assert re.fullmatch("[0-9a-f]{16}", model.description["weights"])
    assert same.description == model.description
    assert other.description["weights"] != model.description["weights"]
    ids = torch.zeros(2, 3).long()
    assert model.reader(CPU, str(tmp_path))(ids).shape == (2, 3, 8)
    assert model.loaded == 1

    class Named(OwnModel):
        fingerprint = "seed-0"

    named = Named(0)
    assert named.description["weights"] == "seed-0"
    assert named.loaded == 0


def test_files_are_hashed_once(model_folder, monkeypatch):
    model, calls = frozen_model(model_folder), []
    hashed = frozen_model_file.model_fingerprint
    monkeypatch.setattr(
        frozen_model_file, "model_fingerprint", lambda *name: calls.append(name) or hashed(*name)
    )
    assert model.description == model.description
    assert len(calls) == 1


def test_it_says_what_it_is():
    model = frozen_model("quickstart", dtype="bfloat16")
    assert str(model) == "model_name='quickstart', layer=1, model_dtype='bfloat16'"


def test_several_sites_are_read_in_one_pass_beside_each_other(model_folder, tmp_path):
    ids = torch.arange(6).view(2, 3)
    model = LanguageModel(str(model_folder), [2, 0], site=["resid_post", "z"])
    alone = [
        LanguageModel(str(model_folder), layer, site=site)
        for layer in (2, 0)
        for site in ("resid_post", "z")
    ]
    names = ["layer_2", "layer_2_z", "layer_0", "layer_0_z"]
    assert list(model.sites.items()) == [(name, D_MODEL) for name in names]
    assert model.d_model == 4 * D_MODEL
    expected = torch.cat([each.residual_stream(CPU).read(ids) for each in alone], -1)
    assert torch.equal(model.read(ids, CPU), expected)
    cached = model.reader(CPU, str(tmp_path))
    assert torch.equal(cached(ids), expected)
    model.write_caches()
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{model_folder.name}-layer-2,0-resid_post,z-float32-")
    found = LanguageModel(str(model_folder), [2, 0], site=["resid_post", "z"])
    assert torch.equal(found.reader(CPU, str(tmp_path))(ids), expected)
    assert not found._streams


def test_others_names_of_sites_are_the_right_ones_or_none(model_folder):
    def names(layer, site):
        model = LanguageModel(str(model_folder), layer, site=site)
        model.residual_stream(CPU)
        found = model.names_elsewhere
        return found["hook_name"], found["transformer_lens_hook_name"]

    assert names(1, "resid_post") == ("transformer.h.1", "blocks.1.hook_resid_post")
    assert names(1, "mlp_out") == ("transformer.h.1.mlp", "blocks.1.hook_mlp_out")
    assert names(1, "z") == (None, "blocks.1.attn.hook_z")
    assert names("transformer.h.1", "mlp_out") == ("transformer.h.1.mlp", None)
    assert names(1, ["mlp_in", "mlp_out"]) == (
        [None, "transformer.h.1.mlp"],
        ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"],
    )


def test_the_site_is_part_of_what_an_activation_is(model_folder):
    model = LanguageModel(str(model_folder), 1, site="z")
    assert model.description["site"] == "z"
    assert str(model) == f"model_name={str(model_folder)!r}, layer=1, site='z', " + (
        "model_dtype='float32'"
    )
    with pytest.raises(UsageError, match=r"^layer=9 is out of range: .* has layers 0 to 2$"):
        _ = LanguageModel(str(model_folder), [1, 9]).config
