import pytest
import torch

from lightning_sae.data.language_model import LanguageModel
from tests.data.tiny import POSITIONS, save_model

CPU = torch.device("cpu")


def language_model(name, layer=1):
    return LanguageModel(str(name), layer)


def test_the_packaged_model():
    model = language_model("quickstart")
    assert model.residual_stream(CPU).read(torch.zeros(1, 4).long()).isfinite().all()
    assert len(model.tokenizer(128)) <= model.config.vocab_size


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


def test_lengths_the_model_has_not(model_folder):
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
