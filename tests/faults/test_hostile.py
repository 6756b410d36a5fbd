"""Files made to run code or to exhaust the machine: nothing runs, and one line tells of it."""

import json
import os
import pickle
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.cli import main
from lightning_sae.cli.configurations import PACKAGE
from tests.faults.runs import arguments, checkpoints

MODEL = PACKAGE / "quickstart"


class Payload:
    """What runs when it is unpickled: it makes a file called `marker`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marker",)


@pytest.fixture(autouse=True)
def _nothing_runs(_elsewhere, tmp_path: Path):
    yield
    assert not (tmp_path / "marker").exists()


def good(**changes: Any) -> dict[str, Any]:
    """The contents of a checkpoint, as `torch.save` takes them."""
    weights = TopKSAE(d_model=4, n_features=8, k=2).state_dict()
    hparams = {"d_model": 4, "n_features": 8, "k": 2}
    return {
        "state_dict": weights,
        "loops": {},
        "hyper_parameters": hparams,
        "architecture": "TopKSAE",
        "pytorch-lightning_version": "2.6.6",
        **changes,
    }


def repacked(change: Callable[[str, bytes], bytes], compression: int) -> bytes:
    """A checkpoint whose records were changed, and compressed or not."""
    torch.save(good(), "good.ckpt")
    with zipfile.ZipFile("good.ckpt") as old, zipfile.ZipFile("new", "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    Path("good.ckpt").unlink()
    content = Path("new").read_bytes()
    Path("new").unlink()
    return content


def saved(contents: Any, **options: Any) -> bytes:
    torch.save(contents, "saved", **options)
    content = Path("saved").read_bytes()
    Path("saved").unlink()
    return content


def replaced(part: str, content: bytes) -> bytes:
    """A checkpoint with one of its records replaced."""
    return repacked(lambda name, old: content if name.endswith(part) else old, zipfile.ZIP_STORED)


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "a pickle": lambda: pickle.dumps(Payload()),
    "a payload beside good weights": lambda: saved(good(x=Payload())),
    "a payload in the old format": lambda: saved(
        good(x=Payload()), _use_new_zipfile_serialization=False
    ),
    "a payload in place of the index": lambda: replaced("data.pkl", pickle.dumps(Payload())),
    "a class": lambda: saved(good(x=torch.nn.Linear)),
    "a function": lambda: saved(good(x=os.system)),
    "a module": lambda: saved(good(state_dict=torch.nn.Linear(2, 2))),
    "no dictionary": lambda: saved([1, 2, 3]),
    "an empty archive": lambda: b"PK\x05\x06" + bytes(18),
    "no weights": lambda: saved({"loops": {}, "state_dict": {}}),
    "weights that unpack to a thousand times the file": lambda: repacked(
        lambda name, old: bytes(50_000_000) if name.endswith("/data/0") else old,
        zipfile.ZIP_DEFLATED,
    ),
    "names that leave the folder": lambda: repacked(
        lambda name, old: old, zipfile.ZIP_STORED
    ).replace(b"data.pkl", b"../../.p"),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint(name: str, command: str, text: Path, told, tmp_path: Path):
    (tmp_path / "x.ckpt").write_bytes(CHECKPOINTS[name]())
    line = told(arguments(command, data__text=text, ckpt_path="x.ckpt"))
    assert "ckpt_path=x.ckpt is no checkpoint of an SAE, or is damaged" in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


TRICKS: dict[str, dict[str, Any]] = {
    "an instantiator": {"_instantiator": "os.mkdir", "path": "marker"},
    "a class": {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "os.mkdir",
        "path": "marker",
    },
    "an optimizer": {  # Lightning 2.6.6 runs this one
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "lightning_sae.TopKSAE",
        "optimizer": {"class_path": "os.mkdir", "init_args": {"path": "marker"}},
    },
}


@pytest.mark.parametrize("name", TRICKS)
def test_hyperparameters_that_name_code_at_the_command_line(name, text, told, tmp_path):
    """They are not looked at: the configuration decides. The weights are of another width."""
    torch.save(good(hyper_parameters=good()["hyper_parameters"] | TRICKS[name]), "x.ckpt")
    line = told(arguments(data__text=text, ckpt_path="x.ckpt"))
    assert "the checkpoint holds TopKSAE(d_model=4, n_features=8)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("name", TRICKS)
def test_hyperparameters_that_name_code_in_python(name: str):
    torch.save(good(hyper_parameters=good()["hyper_parameters"] | TRICKS[name]), "x.ckpt")
    foreign = TRICKS[name].keys() - {"_instantiator", "_class_path", "optimizer"}
    if not foreign:
        TopKSAE.load_from_checkpoint("x.ckpt")
        return
    with pytest.raises(UsageError, match=r"is not of a TopKSAE: .* keyword argument 'path'"):
        TopKSAE.load_from_checkpoint("x.ckpt")


def test_a_checkpoint_from_the_network(tmp_path: Path, monkeypatch):
    torch.save(good(x=Payload()), "x.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.ckpt"
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            TopKSAE.load_from_checkpoint(address)
        server.shutdown()


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.mkdir ["marker"]',
        '!!python/object/new:os.mkdir ["marker"]',
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!Payload {}",
    ],
)
def test_a_configuration_with_a_tag(tag: str, told, tmp_path: Path):
    (tmp_path / "x.yaml").write_text(f"seed_everything: {tag}\n")
    assert "config=x.yaml: Problems parsing config" in told(["fit", "--config", "x.yaml"])


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    """The beginning of a safetensors file."""
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    return sized(json.dumps(entries).encode())


def sized(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "a header that is no JSON": sized(b"{" * 1000),
    "tensors that overlap": header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])) + bytes(12),
    "a tensor beyond the end": header(activations=("F32", [10**9], [0, 4 * 10**9])) + bytes(8),
    "a shape that overflows": header(activations=("F32", [2**40, 2**40], [0, 8])) + bytes(8),
    "another tensor": header(b=("F32", [2], [0, 8])) + bytes(8),
    "a pickle": pickle.dumps(Payload()),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_model(name: str, text, told, tmp_path: Path):
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("text", "*.py"))
    (tmp_path / "model/model.safetensors").write_bytes(SAFETENSORS[name])
    line = told(arguments(data__text=text, data__model_name="./model"))
    assert "model_name='./model'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_in_a_pickle(text, told, tmp_path: Path):
    ignored = shutil.ignore_patterns("text", "*.py", "*.safetensors")
    shutil.copytree(MODEL, tmp_path / "model", ignore=ignored)
    torch.save({"x": Payload()}, tmp_path / "model/pytorch_model.bin")
    assert "model_name='./model'" in told(arguments(data__text=text, data__model_name="./model"))


def test_a_model_with_code_of_its_own(text, told, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the user who says yes to everything
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("text", "*.py"))
    (tmp_path / "model/evil.py").write_text("import os\nos.mkdir('marker')\n")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert "model_name='./model'" in told(arguments(data__text=text, data__model_name="./model"))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_cache(name: str, text, told, tmp_path: Path):
    settings = {"data__text": text, "data__cache_dir": "cache", "trainer__max_steps": 1}
    main(arguments(**settings, trainer__limit_val_batches=0))
    cached = list((tmp_path / "cache").rglob("*.safetensors"))
    for file in cached:
        file.write_bytes(SAFETENSORS[name])
    assert "is damaged" in told(arguments(**settings, trainer__limit_val_batches=0))
    assert len(checkpoints(tmp_path)) == 1


def test_a_data_set_with_code_of_its_own(told, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.py").write_text("import os\nos.mkdir('marker')\n")
    assert "text='./data'" in told(arguments(data__text="./data"))
