import json

import pytest
import torch
import transformers

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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_embd", 32, "its weights have other shapes than its config.json says$"),
        ("vocab_size", 500, "its weights have other shapes than its config.json says$"),
        ("n_layer", 4, r"its files lack the weights transformer\.h\.3\.attn\.c_attn\.bias$"),
        ("n_layer", 2, r"its files have the weights transformer\.h\.2\..*there are 2 of these"),
        ("n_head", 3, "`embed_dim` must be divisible by num_heads"),
        ("activation_function", "nope", "KeyError: 'nope'$"),
        ("n_embd", "x", "StrictDataclassFieldValidationError: .*'n_embd'"),
    ],
)
def test_a_configuration_unlike_the_weights(tmp_path, key, value, message):
    folder = save_model(tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"^model_name='.*model': {message}") as caught:
        language_model(folder).residual_stream(CPU)
    assert "\n" not in str(caught.value)


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32}
QWEN = SIZES | {"num_key_value_heads": 1}
QWEN |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def saved(folder, model):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertForMaskedLM", "BertModel", "MPNetModel"])
def test_an_encoder_is_read_but_predicts_no_next_token(tmp_path, name):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SIZES)).eval()
    stream = language_model(saved(tmp_path / "model", model)).residual_stream(CPU)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(stream.read(ids), expected)
    assert not stream.is_causal_language_model


@pytest.mark.parametrize("layer", [1, "model.language_model.layers.1"])
def test_a_model_without_a_causal_class_is_loaded_by_its_own(tmp_path, layer):
    vision = {"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=QWEN, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    read = language_model(saved(tmp_path / "model", model), layer)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
    assert read.d_model == 16
    assert torch.equal(read.residual_stream(CPU).read(ids), expected)
    assert read.residual_stream(CPU).is_causal_language_model


def test_a_path_that_is_none(model_folder):
    model = language_model(model_folder, "transformer.nope")
    message = r"^layer='transformer.nope': GPT2LMHeadModel has no such module$"
    with pytest.raises(ValueError, match=message):
        model.residual_stream(CPU)
