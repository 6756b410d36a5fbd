"""Language models of a few families, tiny, and where their blocks are."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

LAYERS = 3
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=24),
}


def tiny(config, auto_class=AutoModelForCausalLM):
    """Return a model with random weights that are large: small ones hide what a block adds."""
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def blocks(model):
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers
