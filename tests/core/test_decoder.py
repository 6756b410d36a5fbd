"""Directions have unit norm in state dicts, whatever a loop forgets."""

import copy

import torch
from torch import nn

from lightning_sae import TopKSAE
from lightning_sae.core.decoder import Decoder


def norms(weight: torch.Tensor) -> torch.Tensor:
    return weight.norm(dim=1)


def test_a_loop_that_forgets_to_normalize_saves_unit_norms():
    torch.manual_seed(0)
    host = nn.ModuleDict({"sae": TopKSAE(8, 24, 3)})
    sae = host["sae"]
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        sae.loss(torch.randn(64, 8))[0].backward()
        optimizer.step()
    assert norms(sae.decoder.weight).max() > 1.01
    saved = host.state_dict()["sae.decoder.weight"]
    torch.testing.assert_close(norms(saved), torch.ones(24))
    again = TopKSAE(8, 24, 3)
    again.load_state_dict(sae.state_dict())
    x = torch.randn(16, 8)
    torch.testing.assert_close(again(x), sae(x))  # directions are all that counts


def test_rows_that_have_unit_norm_are_saved_as_they_are():
    torch.manual_seed(0)
    decoder = Decoder(300, 500)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        decoder.to(dtype).normalize()
        assert decoder.state_dict()["weight"].data_ptr() == decoder.weight.data_ptr()


def test_a_decoder_without_memory_or_weights_has_a_state_dict():
    with torch.device("meta"):
        assert TopKSAE(4, 8, 2).state_dict()["decoder.weight"].is_meta
    decoder = Decoder(4, 3)
    nn.utils.parametrize.register_parametrization(decoder, "weight", nn.Identity())
    assert "parametrizations.weight.original" in decoder.state_dict()


def test_a_row_of_zeros_stays():
    decoder = Decoder(4, 3)
    decoder.weight.data[1] = 0
    assert torch.equal(decoder.state_dict()["weight"][1], torch.zeros(4))
    assert torch.equal(
        copy.deepcopy(decoder).state_dict()["weight"], decoder.state_dict()["weight"]
    )
