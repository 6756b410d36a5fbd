"""Padded contexts are read as they are alone, by models that count positions in any way."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    MPNetConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from lightning_sae.residual_stream import ResidualStream
from tests.helpers.language_models import CONFIGS, SIZES, tiny


def test_padding_does_not_change_the_tokens_before_it(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[:, 5:] = 0
    stream = ResidualStream(model, 1)
    padded = stream.read(input_ids, attention_mask=mask)
    torch.testing.assert_close(padded[:, :5], stream.read(input_ids[:, :5]))


def test_padding_before_the_tokens_is_not_read(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[:, :2] = 0
    stream = ResidualStream(model, 1)
    other = input_ids.clone()
    other[:, :2] = (other[:, :2] + 1) % 50
    masked = [stream.read(ids, attention_mask=mask)[:, 2:] for ids in (input_ids, other)]
    torch.testing.assert_close(masked[0], masked[1])
    logits = [stream.replace(ids, lambda x: x, mask)[:, 2:] for ids in (input_ids, other)]
    torch.testing.assert_close(logits[0], logits[1])


SMALL = {**SIZES, "intermediate_size": 24}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}
COUNTING = {
    **{name: (config, AutoModelForCausalLM) for name, config in CONFIGS.items()},
    "opt": (OPTConfig(**OPT), AutoModelForCausalLM),
    "roberta, causal": (RobertaConfig(**SMALL, is_decoder=True), AutoModelForCausalLM),
    "xlm_roberta": (XLMRobertaConfig(**SMALL), AutoModelForMaskedLM),
    "mpnet": (MPNetConfig(**SMALL), AutoModelForMaskedLM),
}


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("padding", [1, 5])  # 1 is what most of them pad with
def test_tokens_after_padding_are_read_as_they_are_alone(name, padding):
    stream = ResidualStream(tiny(*COUNTING[name]), 1)
    ids = torch.randint(4, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((2, 3), padding), ids], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    found = stream.read(padded, mask)[:, 3:]
    torch.testing.assert_close(found, stream.read(ids), rtol=1e-4, atol=1e-5)
    logits = stream.replace(padded, lambda x: 0.5 * x, mask)[:, 3:]
    expected = stream.replace(ids, lambda x: 0.5 * x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


class Adapted(nn.Module):
    """A model as PEFT wraps it."""

    main_input_name = "input_ids"

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config, self.device = model.config, model.device

    def get_base_model(self):
        return self.base_model

    def get_decoder(self):
        return self.base_model.get_decoder()

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)


def test_a_wrapped_model_counts_positions_as_the_model_does(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    stream, wrapped = ResidualStream(model, 1), ResidualStream(Adapted(model), 1)
    assert torch.equal(wrapped.read(input_ids, mask), stream.read(input_ids, mask))
