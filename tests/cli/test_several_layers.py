"""`several_layers.yaml` as a user meets it: an SAE for each layer, from one pass of the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_sae.cli import main
from tests.cli.test_command import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Measured with what is in the checkpoint"),
]

FOLDER = "runs/several_layers/version_0"
CHECKPOINT = f"{FOLDER}/checkpoints/last.ckpt"


def run(command: str, config: str, *given: str) -> None:
    """Run it as small as the other configurations."""
    own = {"model.sae.n_features": SMALL["model.n_features"]} if "several" in config else {}
    kept = SMALL if not own else {k: v for k, v in SMALL.items() if k != "model.n_features"}
    settings = [f"--{key}={value}" for key, value in (kept | own).items()]
    main([command, "--config", config, *settings, *given])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("several_layers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr(sys, "argv", ["lightning_sae"])
        run("fit", "several_layers.yaml")
        run("fit", "mutual_choice.yaml", "--data.layer=3")
    return made


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])


def test_each_is_that_of_a_run_with_the_configuration_of_one():
    one, alone = Path(FOLDER, "pretrained/layer_3"), Path("runs/mutual_choice/version_0/pretrained")
    theirs = load_file(alone / "model.safetensors")
    found = load_file(one / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    assert json.loads((one / "config.json").read_text()) == json.loads(
        (alone / "config.json").read_text()
    )
    assert (one / "README.md").read_text() == (alone / "README.md").read_text()


def test_curves_are_side_by_side():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(FOLDER).Reload()
    scalars = set(events.Tags()["scalars"])
    for layer in (1, 2, 3):
        names = {f"train/layer_{layer}/{name}" for name in ("l0", "fvu", "threshold", "loss")}
        names |= {f"val/layer_{layer}/{name}" for name in ("fvu", "loss_recovered_mean", "kl")}
        assert names | {f"lr-Adam/layer_{layer}", "train/tokens_per_second"} <= scalars
        assert f"val/layer_{layer}/density_by_rank" in events.Tags()["images"]
        assert f"val/layer_{layer}/top_contexts/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_test_has_a_column_for_each(capsys):
    config = ["--config", "several_layers.yaml", "--data.test_tokens=2048"]
    main(["test", *config, f"--ckpt_path={CHECKPOINT}"])  # n_features are in the checkpoint
    table = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["layer_1", "layer_2", "layer_3"] for line in table)
    (row,) = (line for line in table if line.startswith("loss_recovered_mean "))
    together = row.split()[3]
    given = ["--data.test_tokens=2048", f"--ckpt_path={FOLDER}/pretrained/layer_3"]
    main(["test", "--config", "mutual_choice.yaml", *given])  # and so is the layer
    (row,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("loss_recovered_m")
    )
    assert row.split()[1] == together


def test_matches_of_each_are_written():
    run("predict", "several_layers.yaml", f"--ckpt_path={CHECKPOINT}")
    (matches,) = Path("runs/several_layers").glob("*/matches")
    assert sorted(each.name for each in matches.iterdir()) == ["layer_1", "layer_2", "layer_3"]


def test_a_run_goes_on():
    more = ["--trainer.max_steps=6", "--trainer.logger.init_args.name=longer"]
    run("fit", "several_layers.yaml", f"--ckpt_path={CHECKPOINT}", *more)
    path = Path("runs/longer/version_0/checkpoints/last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    "command", ["report", "export --to=saelens --output=theirs --without_discount=true"]
)
def test_one_is_reported_or_exported_from_its_folder(command: str):
    name, *options = command.split()
    where = r"last\.ckpt holds several SAEs: name the folder of one, layer_1, layer_2, layer_3, in "
    with pytest.raises(SystemExit, match=where):
        main([name, *options, f"--ckpt_path={CHECKPOINT}"])
    tokens = "--tokens=256"
    main([name, *options, f"--ckpt_path={FOLDER}/pretrained/layer_2", tokens])
    assert Path("report.html" if name == "report" else "theirs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "fit --config several_layers.yaml --data.layer=2",
            r"SeveralSAEs trains an SAE for each of several sites, and the data have one",
        ),
        (
            "fit --config several_layers.yaml --model.sae=lightning_sae.TopKTranscoder "
            "--model.sae.n_features=64 --model.sae.k=4",
            r"sae=TopKTranscoder: SeveralSAEs trains SAEs, which reconstruct what they read",
        ),
        (
            f"test --config several_layers.yaml --ckpt_path={FOLDER}/pretrained/layer_1",
            r"holds one SAE, and model=SeveralSAEs is measured from a checkpoint of all",
        ),
        (
            f"test --config mutual_choice.yaml --ckpt_path={CHECKPOINT}",
            r"last\.ckpt holds several SAEs: name the folder of one, layer_1, layer_2, layer_3",
        ),
        (
            "test --config several_layers.yaml "
            "--ckpt_path=runs/mutual_choice/version_0/checkpoints/last.ckpt",
            r"the checkpoint holds one SAE, the configuration asks for SAEs of layer_1, layer_2",
        ),
        (
            "fit --config several_layers.yaml "
            f"--model.sae.start_from=./{FOLDER}/pretrained/layer_1",
            r"start_from=\./.*/layer_1/layer_1: there is no such file or folder$",
        ),
    ],
)
def test_what_cannot_be_is_one_line(line: str, message: str):
    with pytest.raises(SystemExit, match=message) as ended:
        main(line.split())
    assert len(str(ended.value).splitlines()) == 1
