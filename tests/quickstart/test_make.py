"""The packaged language model and text sample are what their card says."""

import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lightning_sae.quickstart import FOLDER, TEXT, make

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def texts() -> dict[str, list[make.Document]]:
    rows = {name: pq.read_table(TEXT / f"{name}.parquet") for name in ("train", "validation")}
    return {name: [make.Document(**row) for row in t.to_pylist()] for name, t in rows.items()}


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def slice_of_validation(texts: dict[str, list[make.Document]]) -> Tensor:
    """A fixed 32 contexts of files that the model never saw."""
    stream = make.encode(texts["validation"][::8])
    step = (len(stream) - make.CONTEXT) // 32
    return make.windows(stream, step * torch.arange(32).numpy())


def test_the_folder_s_own_module_imports_nothing_heavy():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(FOLDER / "__init__.py")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ours
    assert run.stdout.strip() == "False"


def test_files_are_small():
    def size(*files: Path) -> int:
        return sum(file.stat().st_size for file in files)

    assert size(FOLDER / "model.safetensors") <= 12 * MEBIBYTE
    assert size(*TEXT.iterdir()) <= 4 * MEBIBYTE


def test_loads_without_warnings(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = AutoModelForCausalLM.from_pretrained(
            FOLDER, dtype=torch.float32, output_loading_info=True
        )
        AutoTokenizer.from_pretrained(FOLDER)
    assert not any(info.values())
    assert not caplog.records


def test_model_has_the_card_s_shape(model: GPT2LMHeadModel):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_273_664
    assert len(model.transformer.h) == 4
    assert model.config.n_positions == make.CONTEXT


def test_validation_files_were_never_seen(texts: dict[str, list[make.Document]]):
    train, validation = texts["train"], texts["validation"]
    assert not any(make.is_held_out(document.path) for document in train)
    assert all(make.is_held_out(document.path) for document in validation)
    assert not {document.text for document in train} & {document.text for document in validation}


def test_text_is_wordy_and_enough(texts: dict[str, list[make.Document]]):
    sizes = {name: sum(len(d.text) for d in documents) for name, documents in texts.items()}
    assert 0.10 <= sizes["validation"] / sum(sizes.values()) <= 0.15
    for documents in texts.values():
        assert not any(make.SKIPPED.search(document.path) for document in documents)
        assert all(make.is_wordy(document.text) for document in documents[::10])


def test_tokenizer_round_trips_source_text(texts: dict[str, list[make.Document]]):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.is_fast
    assert tokenizer.bos_token == tokenizer.eos_token == make.END
    assert len(tokenizer) == make.VOCABULARY
    for document in texts["validation"][::10]:
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text
    assert tokenizer.encode("a" + make.END).count(tokenizer.eos_token_id) == 1


@torch.inference_mode()
def test_model_predicts_and_every_block_s_output_matters(
    model: GPT2LMHeadModel, slice_of_validation: Tensor
):
    loss = make.cross_entropy(model, slice_of_validation)
    assert loss <= 3.5

    def zero(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    for block in model.transformer.h:
        with block.register_forward_hook(zero):
            assert make.cross_entropy(model, slice_of_validation) >= loss + 3.0
