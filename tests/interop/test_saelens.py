"""SAEs in SAELens' format, and, where it is installed, in SAELens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_sae import GatedSAE, UsageError
from lightning_sae.cli import main
from lightning_sae.interop import load_foreign, unfold
from tests.helpers.foreign import (
    RECORD,
    as_its_card_says,
    assert_same,
    every_kind,
    there_and_back,
    tokens,
    trained,
)


@every_kind
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
def test_every_architecture_can_leave_and_come_back(kind, normalize_inputs, tmp_path: Path):
    sae = trained(kind, normalize_inputs=normalize_inputs)
    assert_same(sae, there_and_back(sae, "saelens", tmp_path))


OWN = [{"importance": "token_norm"}, {"rank_discount": 0.6}]
OWN.append(OWN[0] | OWN[1])


@pytest.mark.parametrize("kind", ["mutual_choice", "feature_choice_zipf"])
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
@pytest.mark.parametrize("options", OWN)
def test_thresholds_that_saelens_lacks_have_a_class(kind, normalize_inputs, options, tmp_path):
    sae = trained(kind, normalize_inputs=normalize_inputs, **options)
    again = there_and_back(sae, "saelens", tmp_path)
    assert_same(sae, again)
    assert again.hparams["rank_discount"] == options.get("rank_discount", 0)
    assert again.hparams["importance"] == options.get("importance", "affinity")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "lightning_sae_jumprelu"


def test_a_factor_for_each_token_does_not_change_which_are_its_largest(tmp_path: Path):
    sae = trained("topk", importance="token_norm")
    assert_same(sae, there_and_back(sae, "saelens", tmp_path))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "topk"


def test_what_is_known_goes_with_it(tmp_path: Path):
    sae = trained("mutual_choice")
    there_and_back(sae, "saelens", tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (
        metadata.items()
        >= {
            "model_name": "someone/model",
            "hook_name": "blocks.3.hook_resid_post",
            "hf_hook_name": "model.layers.3",
            "context_size": 128,
            "dataset_path": "some/text",
            "prepend_bos": True,
            "l0": 4.0,
            "training_architecture": "MutualChoiceSAE",
        }.items()
    )
    folded = load_foreign(f"saelens:{tmp_path}")
    assert folded.record == RECORD
    assert folded.architecture == "MutualChoiceSAE"
    torch.testing.assert_close(folded.density, sae.history.density, rtol=1e-4, atol=1e-9)


def test_heads_are_put_beside_each_other_there(tmp_path: Path):
    sae = trained("topk")
    sae.record = {"trained_on": {"layer": 3, "site": "z", "model_name": "someone/model"}}
    sae.record["trained_on"]["transformer_lens_hook_name"] = "blocks.3.attn.hook_z"
    assert_same(sae, there_and_back(sae, "saelens", tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    del config["metadata"]["lightning_sae"]  # as in a file of SAELens
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load_foreign(f"saelens:{tmp_path}").record["trained_on"] == sae.record["trained_on"] | {
        "transformer_lens_hook_name": "blocks.3.attn.hook_z"
    }


def test_gated_saes_are_read(tmp_path: Path):
    """By the formula of its encoder, written out."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 24), "W_dec": (24, 16), "b_dec": (16,)}
    shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (24,))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    x = tokens()
    for subtracts in (True, False):
        config = {"architecture": "gated", "d_in": 16, "d_sae": 24, "metadata": {"l0": 5}}
        config["apply_b_dec_to_input"] = subtracts
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        products = (x - tensors["b_dec"] * subtracts) @ tensors["W_enc"]
        magnitudes = (products * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
        codes = magnitudes * (products + tensors["b_gate"] > 0)
        folded = load_foreign(f"saelens:{tmp_path}")
        torch.testing.assert_close(folded(x)[0], codes, rtol=1e-4, atol=1e-3)
        sae = unfold(folded)
        assert type(sae) is GatedSAE
        expected = codes @ tensors["W_dec"] + tensors["b_dec"]
        torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-2)


def foreign(folder: Path, **settings) -> dict[str, torch.Tensor]:
    """Write an SAE as SAELens does whose rows have any length."""
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae = 16, 24
    config = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "metadata": {"l0": 5}}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none"} | settings
    tensors = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator),
        "b_dec": torch.randn(d_in, generator=generator),
    }
    if config["architecture"] == "jumprelu":
        tensors["threshold"] = torch.rand(d_sae, generator=generator)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def hidden_pre(t: dict[str, torch.Tensor], x: torch.Tensor, subtract: bool = True) -> torch.Tensor:
    """What SAELens computes before its activation function, written out."""
    return (x - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]


@pytest.mark.parametrize("subtract", [True, False])
def test_rows_of_any_length_are_read(subtract: bool, tmp_path: Path):
    t = foreign(tmp_path, apply_b_dec_to_input=subtract)
    sae, x = unfold(load_foreign(f"saelens:{tmp_path}")), torch.randn(256, 16)
    assert sae.k == 5
    pre = hidden_pre(t, x, subtract)
    codes = pre * (pre > t["threshold"])
    lengths = t["W_dec"].norm(dim=1)
    torch.testing.assert_close(sae.encode(x), codes * lengths, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), codes @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-4)


def test_topk_that_ranks_by_codes_times_lengths_is_read_and_no_other(tmp_path: Path):
    t = foreign(tmp_path, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    sae, x = unfold(load_foreign(f"saelens:{tmp_path}")), torch.randn(256, 16)
    lengths = t["W_dec"].norm(dim=1)
    kept = (hidden_pre(t, x) * lengths).topk(3, dim=1)
    codes = torch.zeros(256, 24).scatter(1, kept.indices, kept.values.clamp_min(0))
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-4, atol=1e-4)
    expected = (codes / lengths) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)
    foreign(tmp_path, architecture="topk", k=3, rescale_acts_by_decoder_norm=False)
    with pytest.raises(UsageError, match="rows have different lengths"):
        unfold(load_foreign(f"saelens:{tmp_path}"))


UNREAD = {"architecture": "temporal", "normalize_activations": "layer_norm"}
UNREAD |= {"reshape_activations": "hook_q"}


@pytest.mark.parametrize(("name", "value"), UNREAD.items())
def test_what_is_not_read_is_told(name: str, value: str, tmp_path: Path):
    foreign(tmp_path, **{name: value})
    with pytest.raises(UsageError, match=f"^saelens:.*: {name}='{value}'.* is not read"):
        load_foreign(f"saelens:{tmp_path}")


@every_kind
@pytest.mark.parametrize("importance", ["affinity", "token_norm"])
def test_saelens_loads_it(kind: str, importance: str, tmp_path: Path):
    saelens = pytest.importorskip("sae_lens")
    ranks = kind not in ("standard", "jumprelu", "gated")
    length = "token" if importance == "affinity" else "average"
    options = {"importance": importance} if ranks else {}
    sae = trained(kind, normalize_inputs=length, **options)
    there_and_back(sae, "saelens", tmp_path)  # which registers the class that SAELens lacks
    loaded, x = saelens.SAE.load_from_disk(tmp_path), tokens()
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    same = ((loaded.encode(x) > 0) == (sae.encode(x) > 0)).all(1)
    assert same.sum() >= len(x) - 2
    torch.testing.assert_close(loaded(x)[same], sae(x)[same], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("options", [{}, *OWN])
def test_the_lines_on_its_card_load_it(options: dict, tmp_path: Path):
    pytest.importorskip("sae_lens")
    sae = trained("mutual_choice", **options)
    there_and_back(sae, "saelens", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert ("saelens_adapter.register()" in card) == bool(options)
    same = (as_its_card_says(tmp_path, tokens())["codes"] > 0) == (sae.encode(tokens()) > 0)
    assert same.all(1).sum() >= len(tokens()) - 2


ALONE = """
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from sae_lens import SAE

sae = SAE.load_from_disk(sys.argv[1])
x = sae.b_dec + torch.randn(64, sae.cfg.d_in)
assert sae.encode(x).shape == (64, sae.cfg.d_sae)
assert sae(x).isfinite().all()
card = ModelCard.load(Path(sys.argv[1], "README.md"))
assert card.data.library_name == "saelens"
for told in (
    "FeatureChoiceSAE on layer 2 of quickstart",
    "SAE.load_from_disk",
    "transformer.h.2",
    "blocks.2.hook_resid_post",
    "all but special tokens",
    "matches per token (k) | 16 |",
    "loss recovered, against mean ablation | 0.9",
    "(FVU) | 0.1",
):
    assert told in card.text, told
l0 = float(re.search(r"in inference \\| (\\S+) \\|", card.text)[1])
assert 15.5 < l0 < 16.5, l0  # calibrated on other tokens than these
assert sae.cfg.metadata.hf_hook_name == "transformer.h.2"
assert "lightning_sae" not in sys.modules
"""


def test_who_has_only_saelens_loads_it_and_reads_its_card(tmp_path: Path):
    pytest.importorskip("sae_lens")
    out = tmp_path / "out"
    line = ["export", "--ckpt_path=quickstart/feature_choice", "--to=saelens", f"--output={out}"]
    main([*line, "--without_discount=true"])
    run = [sys.executable, "-W", "ignore", "-c", ALONE, str(out)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
