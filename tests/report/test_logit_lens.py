"""What directions do in the output of models, against their own norms and unembeddings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_sae import ResidualStream
from lightning_sae.report import logit_lens

D_MODEL, VOCABULARY = 8, 40
SHARED = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(**SHARED, hidden_size=D_MODEL)),
        lambda model: model.transformer.ln_f,
    ),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**SHARED, hidden_size=D_MODEL, intermediate_size=8)
        ),
        lambda model: model.gpt_neox.final_layer_norm,
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SHARED, hidden_size=D_MODEL, intermediate_size=8)),
        lambda model: model.model.norm,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("features", [3, 70])
@torch.no_grad()
def test_it_is_what_the_norm_and_the_unembedding_say(name: str, features: int):
    torch.manual_seed(0)
    make, norm_of = MODELS[name]
    model = make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    directions = torch.randn(features, D_MODEL)
    found = logit_lens(ResidualStream(model, 0), directions, n=5)

    unit = directions / directions.norm(dim=1, keepdim=True)
    norm, weight = norm_of(model), model.get_output_embeddings().weight
    centred = unit - unit.mean(1, keepdim=True) if name != "llama" else unit
    size = centred.square().mean(1, keepdim=True)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)) / D_MODEL
    raised = (centred / (size + eps).sqrt() * norm.weight) @ weight.T
    for kind, sign in (("promoted", 1), ("demoted", -1)):
        ids, logits = getattr(found, kind), getattr(found, f"{kind}_logits")
        torch.testing.assert_close(logits, raised.gather(1, ids), rtol=1e-4, atol=1e-4)
        best = (sign * raised).topk(5).values * sign
        torch.testing.assert_close(logits, best, rtol=1e-4, atol=1e-4)
