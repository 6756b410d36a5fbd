"""Families of language models in transformers, made tiny from their configurations."""

from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_sae.residual_stream import ResidualStream

LENGTH, D_MODEL, LAYERS = 9, 32, 4
IDS = torch.randint(4, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
TINY = {
    "vocab_size": 300,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "gemma3n_text": {
        "intermediate_size": [48] * LAYERS,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
}
MOST_WEIGHTS = 30_000_000
VISION = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}


def with_weights(model):
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    return model.eval().requires_grad_(requires_grad=False)


def tiny_model(model_type):
    """A causal model of this type, or None if these arguments do not make a small one."""
    try:
        config = CONFIG_MAPPING[model_type](**(TINY | MORE.get(model_type, {})))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(weight.numel() for weight in model.parameters()) > MOST_WEIGHTS:
            return None
        model = with_weights(AutoModelForCausalLM.from_config(config))
        model(IDS)
    except Exception:
        return None
    return model


def outcome(model):
    """What comes of reading and replacing a layer."""
    try:
        stream = ResidualStream(model, 1)
        states = stream.read(IDS)
    except ValueError as error:
        return "wrong" if "\n" in str(error) else "refused"

    def edit(x):
        return 0.7 * x + 0.1

    with torch.no_grad():
        clean = model(IDS, use_cache=False).logits
        right = (
            states.shape == (2, LENGTH, stream.d_model)
            and torch.equal(stream.replace(IDS, lambda x: x), clean)
            and torch.equal(stream.replace(IDS, edit), stream.replace(IDS, edit, states=states))
        )
    return ("causal" if stream.is_causal_language_model else "encoder") if right else "wrong"


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", "causal"),  # with as many lists of experts as blocks
        ("falcon_mamba", "causal"),
        ("bloom", "causal"),  # whose blocks return tuples
        ("openai-gpt", "causal"),  # or lists
        ("bert", "encoder"),
        ("gemma3n_text", "refused"),  # whose blocks have four streams
        ("xlm", "refused"),  # which has no list of blocks
    ],
)
def test_families(model_type, expected):
    assert outcome(tiny_model(model_type)) == expected


@pytest.mark.slow
def test_every_family_is_read_right_or_refused_in_one_line():
    found = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = tiny_model(model_type)
        found[model_type] = "not made" if model is None else outcome(model)
    counts = Counter(found.values())
    told = {name: [t for t in found if found[t] == name] for name in counts}
    assert counts["wrong"] == 0, told["wrong"]
    assert counts["causal"] >= 87, counts
    assert counts["encoder"] >= 15, counts
    assert counts["refused"] <= 6, told["refused"]


def qwen2_vl():
    text = TINY | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    }
    vision = {"depth": LAYERS, "embed_dim": 16, "hidden_size": D_MODEL, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config={**vision, "mlp_ratio": 2})
    return with_weights(transformers.Qwen2VLForConditionalGeneration(config))


def gemma3():
    vision = VISION | {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=TINY, vision_config=vision, mm_tokens_per_image=4
    )
    return with_weights(transformers.Gemma3ForConditionalGeneration(config))


@pytest.mark.parametrize("make", [qwen2_vl, gemma3])
def test_of_a_model_that_sees_images_too_the_part_that_reads_text_is_meant(make):
    """Even if the other one has as many blocks."""
    model = make()
    assert outcome(model) == "causal"
    by_index, by_path = (
        ResidualStream(model, layer).read(IDS) for layer in (1, "model.language_model.layers.1")
    )
    assert torch.equal(by_index, by_path)
