"""Transcoders in SAELens' format, and, where it is installed, in SAELens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_sae import (
    FeatureChoiceTranscoder,
    JumpReLUTranscoder,
    MutualChoiceTranscoder,
    TopKTranscoder,
    UsageError,
)
from lightning_sae.interop import export
from tests.helpers.superposition import superposition

KINDS = {
    "mutual": (MutualChoiceTranscoder, {"rank_discount": 0.0}),
    "feature": (
        FeatureChoiceTranscoder,
        {"rank_discount": 0.0, "mutual_choice_tokens": 1000, "zipf_exponent": 1.0},
    ),
    "jumprelu": (JumpReLUTranscoder, {"bandwidth": 0.1}),
    "topk": (TopKTranscoder, {}),
}


def pair(tokens: int, seed: int) -> torch.Tensor:
    x = superposition(tokens, 16, n_features=32, seed=seed)
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    return torch.cat([7 * x + 20, 3 * (x @ weight).relu() - 50], dim=1)


def trained(kind: str, **options):
    torch.manual_seed(0)
    made, own = KINDS[kind]
    sae = made(16, 48, k=4, d_target=12, **(own | options))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(6):
        loss, _ = sae.loss(pair(512, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
    return sae.eval()


@pytest.mark.parametrize("kind", ["mutual", "feature", "jumprelu"])
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
@pytest.mark.parametrize("skip", [False, True])
def test_it_is_the_same_there(kind, normalize_inputs, skip, tmp_path: Path):
    sae = trained(kind, normalize_inputs=normalize_inputs, skip=skip)
    one, other = export(sae, "saelens", tmp_path, pair(512, seed=9))
    assert max(one.error, other.error) <= 1e-5
    assert other.l0[0] > 1
    assert other.fvu[0] == pytest.approx(other.fvu[1], rel=1e-4)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == f"jumprelu_{'skip_' if skip else ''}transcoder"
    assert config["d_out"] == 12
    assert ("W_skip" in load_file(tmp_path / "sae_weights.safetensors")) == skip


def test_both_hooks_are_told(tmp_path: Path):
    sae = trained("jumprelu")
    hooks = ["blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"]
    sae.record = {"trained_on": {"transformer_lens_hook_name": hooks, "hook_name": [None, "h.3"]}}
    export(sae, "saelens", tmp_path)
    told = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert [told["hook_name"], told["hook_name_out"]] == hooks
    assert told["hf_hook_name_out"] == "h.3"
    assert "hf_hook_name" not in told


@pytest.mark.parametrize(
    ("kind", "options", "to", "message"),
    [
        ("topk", {}, "saelens", "TopKTranscoder: SAELens has transcoders with thresholds, none"),
        (
            "mutual",
            {"importance": "token_norm"},
            "saelens",
            "to=saelens, of a transcoder: .* length",
        ),
        (
            "mutual",
            {"rank_discount": 1.0},
            "saelens",
            "to=saelens, of a transcoder: .*_discount=1.0",
        ),
        ("jumprelu", {}, "sparsify", "JumpReLUTranscoder reconstructs something else than it"),
    ],
)
def test_what_no_class_there_is_is_refused(kind, options, to, message, tmp_path: Path):
    with pytest.raises(UsageError, match=f"^{message}"):
        export(trained(kind, **options), to, tmp_path)
    assert not any(tmp_path.iterdir())
