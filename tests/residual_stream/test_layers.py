import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from lightning_sae.residual_stream import ResidualStream
from tests.helpers.language_models import CONFIGS, LAYERS, blocks


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layer_out_of_range(model, layer):
    name = model.config.model_type
    message = f"^layer={layer} is out of range: {name} has layers 0 to 2$"
    with pytest.raises(ValueError, match=message):
        ResidualStream(model, layer)


def test_lists_inside_blocks_are_not_the_blocks(model, input_ids):
    expected = ResidualStream(model, 1).read(input_ids)
    for block in blocks(model):
        block.experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert torch.equal(ResidualStream(model, 1).read(input_ids), expected)


def test_no_blocks_and_ambiguous_blocks():
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    model.transformer.h.append(nn.Identity())
    with pytest.raises(ValueError, match=r"one ModuleList of 3 blocks, found none; layer may be"):
        ResidualStream(model, 0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(
        ValueError, match=r"found \['encoder.block', 'decoder.block'\]; layer may be"
    ):
        ResidualStream(T5ForConditionalGeneration(config), 0)
