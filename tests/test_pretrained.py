"""SAEs as folders that stand alone: saved, loaded, and shared on a hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, TopKSAE, load
from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH
from lightning_sae.checks import UsageError
from lightning_sae.pretrained import CONFIG, WEIGHTS
from tests.helpers.architectures import (
    D_MODEL,
    N_FEATURES,
    K,
    activations,
    every_architecture,
    train,
)

RECORD = {
    "trained_on": {"model_name": "someone/model", "layer": 3, "hook_name": "model.layers.3"},
    "measured": {"fvu": 0.25, "l0": 4.0, "tokens_seen": 1024, "loss_recovered_mean": None},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def saved(sae, folder: Path) -> Path:
    sae.save_pretrained(folder)
    return folder


@every_architecture
def test_what_was_saved_codes_as_it_did(make, tmp_path: Path):
    sae = make(normalize_inputs="token")
    train(sae, 8)
    sae.record = RECORD
    folder, x = saved(sae, tmp_path / "sae"), activations()
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    for found in (load(folder), type(sae).from_pretrained(folder), load(str(folder))):
        assert type(found) is type(sae)
        assert not found.training
        assert found.record == RECORD
        assert found.hparams == sae.hparams
        assert torch.equal(found.encode(x), sae.encode(x))
        assert torch.equal(found(x), sae(x))
        state = found.state_dict()
        assert all(torch.equal(state[name], value) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"license": "mit"}])
def test_a_second_save_has_a_card_of_its_own_unless_it_was_edited(tmp_path: Path, options: dict):
    def save(n_features: int) -> str:
        sae = TopKSAE(D_MODEL, n_features, 2)
        sae.save_pretrained(tmp_path, model_card_kwargs=options)
        return card.read_text()

    card = tmp_path / "README.md"
    assert "| features | 16 |" in save(16)
    second = save(32)
    assert "| features | 32 |" in second
    assert ("license: mit" in second) == bool(options)
    card.write_text(f"{second}\nMind the gap.\n")
    assert save(16).endswith("Mind the gap.\n")
    card.write_bytes(b"\xff\xfe")  # no UTF-8
    TopKSAE(D_MODEL, 16, 2).save_pretrained(tmp_path)


def test_what_was_loaded_learns_on(tmp_path: Path):
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    train(sae, 2)
    again = load(saved(sae, tmp_path)).train()
    assert_close(train(again, 2), train(sae, 2))


def test_a_decoder_that_a_foreign_loop_left_unnormalised_is_saved_normalised(tmp_path: Path):
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sae.decoder.weight.data.mul_(3)
    saved(sae, tmp_path)
    rows = load_file(tmp_path / WEIGHTS)["decoder.weight"]
    assert_close(rows.norm(dim=1), torch.ones(N_FEATURES))


def test_a_class_may_load_what_one_was_that_it_extends(tmp_path: Path):
    class MeasuredSAE(TopKSAE):
        """The same, with a metric more, say."""

    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    train(sae, 2)
    x = activations()
    assert torch.equal(MeasuredSAE.from_pretrained(saved(sae, tmp_path))(x), sae(x))


def test_settings_may_change_that_do_not_change_a_code(tmp_path: Path):
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
    train(sae, 2)
    saved(sae, tmp_path)
    again = MutualChoiceSAE.from_pretrained(tmp_path, aux_coefficient=0.0)
    assert again.revival.coefficient == 0
    with pytest.raises(UsageError, match=f"^k=1: .* was trained with k={K}"):
        MutualChoiceSAE.from_pretrained(tmp_path, k=1)
    with pytest.raises(UsageError, match="is a MutualChoiceSAE, not a TopKSAE: "):
        TopKSAE.from_pretrained(tmp_path)


NO_CONFIG = f"has no {CONFIG} of an SAE"
FILES = {
    (WEIGHTS, None): f"{WEIGHTS} is damaged, or not there",
    (WEIGHTS, b"cut"): f"{WEIGHTS} is damaged, or not there",
    (CONFIG, None): NO_CONFIG,
    (CONFIG, b"{"): NO_CONFIG,
    (CONFIG, b'{"architectures": ["GPT2LMHeadModel"]}'): NO_CONFIG,
}
SETTINGS = [
    ("lightning_sae_format", 99, "lightning_sae_format=99, and this version"),
    ("architecture", "NoSuchSAE", "a NoSuchSAE, which is none of .*FeatureChoiceSAE.*: import its"),
    ("arguments", {"nosuch": 1}, "unexpected keyword argument 'nosuch'"),
    ("arguments", {"n_features": N_FEATURES + 1}, r"size mismatch for decoder\.weight"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sae = FeatureChoiceSAE(D_MODEL, N_FEATURES, K)
    train(sae, 2)
    return saved(sae, tmp_path)


@pytest.mark.parametrize(("change", "told"), FILES.items())
def test_a_damaged_folder_is_told_in_one_line(change, told: str, folder: Path):
    name, content = change
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        load(folder)


@pytest.mark.parametrize(("name", "value", "told"), SETTINGS)
def test_settings_that_do_not_fit_are_told_in_one_line(name, value, told: str, folder: Path):
    config = json.loads((folder / CONFIG).read_text())
    config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UsageError, match=told):
        load(folder)


def test_what_is_nowhere_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in (tmp_path / "no" / "such" / "folder", "no/such/repository/at/all", "no/such"):
        with pytest.raises(UsageError, match="no/such"):
            load(path)


def set_up(sae: SparseAutoencoder, ckpt_path: str | None = None) -> SparseAutoencoder:
    """Do as a Trainer does before it trains."""
    sae._trainer = SimpleNamespace(ckpt_path=ckpt_path)
    sae.setup("fit")
    sae._trainer = None
    return sae


def in_a_checkpoint(sae: SparseAutoencoder, path: Path) -> Path:
    checkpoint = {"architecture": type(sae).__name__, "loops": {}, KEY: FORMAT}
    torch.save(checkpoint | {TRAINED_WITH: dict(sae.hparams), "state_dict": sae.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def first() -> MutualChoiceSAE:
    torch.manual_seed(0)
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
    train(sae, 100)
    return sae


@every_architecture
@pytest.mark.parametrize("kept", [in_a_checkpoint, lambda sae, path: saved(sae, path)])
def test_training_may_start_from_any_other_sae(make, kept, first, tmp_path: Path):
    path = kept(first, tmp_path / "first.ckpt")
    sae = set_up(make(normalize_inputs="token", start_from=str(path)))
    found, expected = sae.state_dict(), first.state_dict()
    for name in ("encoder.weight", "decoder.weight", "input_scale", "history.density"):
        assert torch.equal(found[name], expected[name]), name
    assert train(sae, 1) < train(make(normalize_inputs="token"), 1)


def test_training_starts_from_another_only_once(first, tmp_path: Path):
    made = {"start_from": str(saved(first, tmp_path / "first")), "normalize_inputs": "token"}
    sae = set_up(TopKSAE(D_MODEL, N_FEATURES, K, **made))
    train(sae, 3)
    again = set_up(load(saved(sae, tmp_path / "second")))
    assert torch.equal(again.decoder.weight, sae.decoder.weight)
    resumed = set_up(TopKSAE(D_MODEL, N_FEATURES, K, **made), ckpt_path="last.ckpt")
    assert not torch.equal(resumed.decoder.weight, first.decoder.weight)


def other_shape(sae: SparseAutoencoder, path: Path) -> Path:
    return in_a_checkpoint(MutualChoiceSAE(D_MODEL, N_FEATURES + 1, K), path)


def other_inputs(sae: SparseAutoencoder, path: Path) -> Path:
    return in_a_checkpoint(
        MutualChoiceSAE(D_MODEL, N_FEATURES, K, normalize_inputs="average"), path
    )


def damaged(sae: SparseAutoencoder, path: Path) -> Path:
    path.write_bytes(b"no checkpoint")
    return path


def empty(sae: SparseAutoencoder, path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (other_shape, f"no SAE with d_model={D_MODEL}, n_features={N_FEATURES}: "),
        (other_inputs, "it was trained with normalize_inputs='average': set that here too"),
        (damaged, "no checkpoint"),
        (empty, NO_CONFIG),
        (lambda sae, path: path, "No such file"),
        (lambda sae, path: path.with_suffix(""), "there is no such file or folder"),
        (lambda sae, path: "saelens:theirs", "must become ours first: lightning_sae import"),
        (lambda sae, path: "not/a/repository", "there is no such file or folder"),
    ],
)
def test_what_training_cannot_start_from_is_told_in_one_line(kept, told, first, tmp_path: Path):
    path = kept(first, tmp_path / "first.ckpt")
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, start_from=str(path))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(UsageError, match=rf"^start_from={re.escape(str(path))}: .*{told}"):
        set_up(sae)
    for name, value in sae.state_dict().items():
        assert_close(value, before[name], equal_nan=True)
