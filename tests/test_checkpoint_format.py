"""Checkpoints of every format so far load: the files are those of `checkpoints_format_1`."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, StandardSAE, TopKSAE
from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH, format_of, is_sae, upgrade
from lightning_sae.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lightning_sae.checks import UsageError

FOLDER = Path(__file__).parent / "checkpoints_format_1"
SAES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mutual_choice": (
        MutualChoiceSAE,
        {
            "k": 2,
            "dead_after_tokens": 16,
            "dying_below": 0.75,
            "importance": "affinity",
            "normalize_inputs": "average",
            "rank_discount": 0.0,
        },
    ),
    "feature_choice": (
        FeatureChoiceSAE,
        {
            "k": 2,
            "mutual_choice_tokens": 16,
            "budgets": "zipf",
            "min_matches": 1.0,
            "per_batch": True,
            "importance": "affinity",
            "normalize_inputs": "average",
            "rank_discount": 0.0,
        },
    ),
    "standard": (StandardSAE, {"l1_coefficient": 0.1}),
    "topk": (TopKSAE, {"k": 2, "dead_after_tokens": 16, "normalize_inputs": "average"}),
}
OLD = {"W_dec", "b_dec", "tokens_seen", "tokens_since_fired", "density"}
NEW = {"decoder.weight", "decoder.bias"}
NEW |= {"history.tokens_seen", "history.tokens_since_fired", "history.density"}


class Probe(pl.LightningModule):
    """A module of someone else's, with an SAE as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.sae = TopKSAE(4, 16, k=2, normalize_inputs="average")
        self.head = torch.nn.Linear(16, 1)


def load(name: str) -> dict[str, Any]:
    """A checkpoint as it was written."""
    return torch.load(FOLDER / f"{name}.ckpt", weights_only=True)


def upgraded(name: str) -> dict[str, Any]:
    checkpoint = load(name)
    upgrade(checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", SAES)
def test_tensors_have_their_present_names(name: str):
    before, after = load(name)["state_dict"], upgraded(name)["state_dict"]
    assert before.keys() - after.keys() == OLD
    assert after.keys() - before.keys() == NEW
    # In the same order, so that each has kept its value.
    assert all(map(torch.equal, before.values(), after.values()))
    assert torch.equal(after["decoder.weight"], before["W_dec"])
    assert torch.equal(after["history.tokens_since_fired"], before["tokens_since_fired"])
    assert is_sae(before)
    assert is_sae(after)


def test_tensors_of_a_child_have_their_present_names():
    before, after = load("child"), upgraded("child")
    renamed = {f"sae.{name}" for name in OLD}, {f"sae.{name}" for name in NEW}
    assert before["state_dict"].keys() - after["state_dict"].keys() == renamed[0]
    assert after["state_dict"].keys() - before["state_dict"].keys() == renamed[1]
    assert not is_sae(after["state_dict"])
    assert KEY not in after  # it is for the parent to say what its format is


@pytest.mark.parametrize("name", SAES)
def test_arguments_have_their_present_names(name: str):
    before, after = load(name)["hyper_parameters"], upgraded(name)["hyper_parameters"]
    changed = {"standard": {"importance"}, "feature_choice": {"mutual_choice_for"}}
    assert before.keys() - after.keys() == changed.get(name, set())
    new = {key: after[key] for key in after.keys() - before.keys()}
    tokens = {"mutual_choice_tokens": 16} if name == "feature_choice" else {}
    discount = {"rank_discount": 0.0} if name.endswith("choice") else {}
    assert new == {"normalize_inputs": "average"} | tokens | discount


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, {"mutual_choice_share": 0}),
        (0.85, {"mutual_choice_share": 0.85}),
        (1, {"mutual_choice_share": 1}),
        (1000.5, {"mutual_choice_tokens": 1001}),
    ],
)
def test_the_two_units_of_the_first_phase_are_told_apart(given: float, expected: dict):
    checkpoint = load("feature_choice")
    others = checkpoint["hyper_parameters"] | {"mutual_choice_for": given}
    checkpoint["hyper_parameters"] = others
    upgrade(checkpoint)
    assert checkpoint["hyper_parameters"].items() >= expected.items()
    names = {key for key in checkpoint["hyper_parameters"] if key.startswith("mutual_choice")}
    assert names == expected.keys()


def test_what_the_command_line_added_is_brought_up_to_date():
    checkpoint = load("topk")
    code = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "x.Y"}
    checkpoint["hyper_parameters"] |= code
    checkpoint["ActivationDataModule"] = {"cursor": (0, 3), "place": {"batch_size": 16}}
    arguments = {"layer": 2, "lm_batch_size": 8, "lm_dtype": "bfloat16", "seed": 0}
    checkpoint["datamodule_hyper_parameters"] = arguments | code
    upgrade(checkpoint)
    assert checkpoint["hyper_parameters"] == upgraded("topk")["hyper_parameters"]
    expected = {"layer": 2, "model_batch_size": 8, "model_dtype": "bfloat16", "seed": 0}
    assert checkpoint["datamodule_hyper_parameters"] == expected
    assert checkpoint["ActivationDataModule"] == {"cursor": (0, 3), "place": {"batch_size": 16}}


def test_everything_else_stays():
    before, after = load("topk"), upgraded("topk")
    changed = {"state_dict", "hyper_parameters", KEY}
    assert after.pop(KEY) == FORMAT
    assert after.pop(TRAINED_WITH).items() <= after["hyper_parameters"].items()
    assert {key for key in before if str(before[key]) != str(after[key])} <= changed
    assert before.keys() == after.keys()


def test_what_is_not_ours_stays():
    foreign = {  # names that other libraries give their SAEs, and arguments that look like ours
        "state_dict": {"W_dec": 1, "b_dec": 2, "encoder.weight": 3, "encoder.bias": 4},
        "hyper_parameters": {"importance": 1, "mutual_choice_for": 2},
        "datamodule_hyper_parameters": {"lm_batch_size": 3},
    }
    checkpoint = copy.deepcopy(foreign)
    upgrade(checkpoint)
    assert checkpoint == foreign
    assert not is_sae(foreign["state_dict"])


def test_format_2_had_one_scale_for_all_tokens():
    checkpoint = upgraded("topk") | {KEY: 2, TRAINED_WITH: {"k": 2, "importance": "affinity"}}
    del checkpoint["hyper_parameters"]["normalize_inputs"]
    upgrade(checkpoint)
    assert checkpoint[KEY] == FORMAT
    assert checkpoint["hyper_parameters"]["normalize_inputs"] == "average"
    assert checkpoint[TRAINED_WITH] == {
        "k": 2,
        "importance": "affinity",
        "normalize_inputs": "average",
    }


@pytest.mark.parametrize("name", ["mutual_choice", "topk"])
def test_format_3_had_no_discount(name: str):
    checkpoint = upgraded(name) | {KEY: 3, TRAINED_WITH: {"k": 2}}
    checkpoint["hyper_parameters"].pop("rank_discount", None)
    upgrade(checkpoint)
    expected = {"rank_discount": 0.0} if name == "mutual_choice" else {}
    assert checkpoint[TRAINED_WITH].items() >= expected.items()
    assert checkpoint["hyper_parameters"].items() >= expected.items()
    assert ("rank_discount" in checkpoint[TRAINED_WITH]) == bool(expected)


def test_the_present_format_stays():
    checkpoint = upgraded("feature_choice")
    again = copy.deepcopy(checkpoint)
    upgrade(again)
    assert str(again) == str(checkpoint)


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "2"])
def test_a_format_that_is_not_known_is_told(number: Any):
    message = (
        f"^the checkpoint has lightning_sae_format={number!r}, and this version .* up to {FORMAT}: "
    )
    with pytest.raises(UsageError, match=message):
        upgrade({KEY: number, "state_dict": {}})
    assert format_of({}) == 1


# What follows needs the classes of the present format


@pytest.mark.parametrize("name", SAES)
def test_it_loads_and_computes_what_it_did(name: str):
    sae = SAES[name][0].load_from_checkpoint(FOLDER / f"{name}.ckpt")
    expected = load_file(FOLDER / f"{name}.safetensors")
    assert_close(sae.encode(expected["x"]), expected["codes"])
    assert_close(sae(expected["x"]), expected["reconstruction"])
    assert int(sae.tokens_seen) == 3 * 16
    for key, value in upgraded(name)["hyper_parameters"].items():
        assert value is None or sae.hparams[key] == value  # None stood for what it is by default


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("plugins", [[], [AtomicCheckpointIO()]], ids=["Lightning", "atomic"])
def test_a_run_goes_on_as_it_did(name: str, plugins: list, tmp_path: Path, monkeypatch):
    # Auxiliary losses were not weighted then.
    monkeypatch.setattr("lightning_sae.core.revival._filled", lambda mask, places: 1.0)
    architecture, options = SAES[name]
    optimizer = partial(torch.optim.Adam, lr=0.01)

    def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
        # A step at the rate that the first run ended with, as was made then.
        return LambdaLR(optimizer, lambda step: 0.0 if step == 3 else 1 - step / 5)

    options = {**options, "optimizer": optimizer, "lr_scheduler": schedule}
    sae = architecture(d_model=4, n_features=16, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=5,
        plugins=plugins,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    activations = torch.randn(5 * 16, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(activations), batch_size=16)
    trainer.fit(sae, data, ckpt_path=FOLDER / f"{name}.ckpt", weights_only=True)
    expected = load_file(FOLDER / f"{name}.safetensors")["resumed_W_dec"]
    assert_close(sae.decoder.weight.data, expected)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert torch.load(tmp_path / "new.ckpt", weights_only=True)[KEY] == FORMAT


def test_a_child_loads_and_computes_what_it_did():
    probe = Probe()
    checkpoint = AtomicCheckpointIO().load_checkpoint(FOLDER / "child.ckpt")
    probe.load_state_dict(checkpoint["state_dict"])
    expected = load_file(FOLDER / "child.safetensors")
    assert_close(probe.sae.encode(expected["x"]), expected["codes"])
    assert_close(probe.sae(expected["x"]), expected["reconstruction"])


@pytest.mark.parametrize("name", SAES)
def test_a_dictionary_of_it_can_be_started_from(name: str):
    sae = FeatureChoiceSAE(4, 16, k=2)
    sae.take_over(read_checkpoint(FOLDER / f"{name}.ckpt")["state_dict"])
    state = load(name)["state_dict"]
    assert torch.equal(sae.decoder.weight.data, state["W_dec"])
    assert torch.equal(sae.history.density, state["density"])
