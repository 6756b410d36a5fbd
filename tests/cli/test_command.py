"""The command line as a user meets it: the shipped configurations, run for a few steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lightning_sae
from lightning_sae.cli import SparseAutoencoderCLI, main
from lightning_sae.cli.configurations import PACKAGE

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHITECTURES = [
    "standard",
    "jumprelu",
    "gated",
    "topk",
    "mutual_choice",
    "feature_choice",
    "matryoshka",
    "transcoder",
]
SMALL = {
    "trainer.max_steps": "4",
    "trainer.val_check_interval": "2",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "model.n_features": "512",
    "data.batch_size": "512",
    "data.batches_per_block": "4",
    "data.validation_tokens": "1024",
    "data.test_tokens": "2048",
}

pytestmark = [
    # Lightning remarks on settings that a four-step run must have.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def arguments(command: str, config: str, **changes: str) -> list[str]:
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return [command, "--config", config, *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in an empty folder, as a command of no arguments: Lightning would warn of pytest's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])


@pytest.mark.parametrize("given", [[], ["--float32_matmul_precision=high"]])
def test_products_are_as_exact_as_the_user_says(given: list[str], monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    with pytest.raises(SystemExit):  # for it trains nothing
        main([*arguments("fit", "topk.yaml", trainer__max_steps="0"), *given])
    assert said == ["high" if given else "highest"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_configuration_fits_tests_and_predicts(name: str, tmp_path: Path, capsys, caplog):
    fewer = {"model__prefixes": "[16, 48]"} if name == "matryoshka" else {}
    main(arguments("fit", f"{name}.yaml", **fewer))
    version = tmp_path / "runs" / name / "version_0"
    folder = str(version.relative_to(tmp_path) / "pretrained")
    assert caplog.messages[-1] == f"The SAE is in {folder}: lightning_sae.load({folder!r})"
    checkpoint = version / "checkpoints" / "last.ckpt"
    raw = torch.load(checkpoint, weights_only=True)
    assert raw["state_dict"]["decoder.weight"].shape == (
        512,
        256,
    )  # the width is the language model's
    assert not any("language_model" in key for key in raw["state_dict"])
    assert raw["global_step"] == 4
    assert (version / "config.yaml").is_file()
    assert list(version.glob("events.out.tfevents.*"))

    capsys.readouterr()
    main(arguments("test", f"{name}.yaml", ckpt_path=str(checkpoint), **fewer))
    table = capsys.readouterr().out
    for row in ("fvu", "l0", "l0_std", "dead_fraction", "loss_recovered_mean", "delta_ce"):
        assert any(line.startswith(f"{row} ") for line in table.splitlines()), table

    main(arguments("predict", f"{name}.yaml", ckpt_path=str(checkpoint), **fewer))
    (folder,) = (tmp_path / "runs" / name).glob("*/matches")
    assert f"The matches are in {folder.relative_to(tmp_path)}" in caplog.text
    written = sorted(folder.glob("*.safetensors"))
    matches = load_file(written[0])
    assert matches["value"].min() > 0
    assert matches["token"].max() < matches["kept"].sum()

    again = getattr(lightning_sae, raw["architecture"]).load_from_checkpoint(checkpoint)
    assert torch.equal(again.W_dec, raw["state_dict"]["decoder.weight"])


def test_the_curves_are_there(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(arguments("fit", "mutual_choice.yaml"))
    events = EventAccumulator(str(tmp_path / "runs/mutual_choice/version_0")).Reload()
    scalars = set(events.Tags()["scalars"])
    train = {"loss", "reconstruction_loss", "aux_k_loss", "l0", "l0_std", "fvu", "dead_fraction"}
    train |= {"massive_fraction", "threshold", "tokens", "tokens_per_second"}
    assert {f"train/{name}" for name in train} <= scalars
    val = {"fvu", "l0", "l0_std", "dead_fraction", "dying_fraction", "threshold", "tokens", "kl"}
    val |= {"loss_recovered_mean", "loss_recovered_zero", "delta_ce", "ce_clean"}
    assert {f"val/{name}" for name in val} <= scalars
    assert {"val/density_histogram", "val/density_by_rank"} <= set(events.Tags()["images"])
    assert "val/top_contexts/text_summary" in events.Tags()["tensors"]
    steps = [event.step for event in events.Scalars("val/fvu")]
    assert steps == [1, 3]  # Lightning counts from zero
    assert "_hparams_/session_start_info" in events.summary_metadata  # fills the tab HPARAMS
    assert [event.value for event in events.Scalars("train/tokens")] == [512, 1024, 1536, 2048]


@pytest.mark.filterwarnings("ignore:Measured with what is in the checkpoint")
def test_a_checkpoint_is_measured_with_what_it_was_trained_with(tmp_path: Path, capsys):
    """What packaged configurations say gives way, what the user says is told if it is other."""
    trained = {"model__k": "5", "model__n_features": "300", "data__layer": "1"}
    main(arguments("fit", "topk.yaml", **trained))
    checkpoint = str(tmp_path / "runs/topk/version_0/checkpoints/last.ckpt")
    small = {key: value for key, value in SMALL.items() if key != "model.n_features"}
    line = ["test", "--config", "topk.yaml", *(f"--{key}={value}" for key, value in small.items())]
    capsys.readouterr()
    told = (
        r"^Measured with what is in the checkpoint: data.layer=1 \(not 2\), model.k=5 \(not 16\), "
        r"model.n_features=300 \(not 2048\)$"
    )
    with pytest.warns(UserWarning, match=told):
        main([*line, f"--ckpt_path={checkpoint}"])
    assert re.search(r"^l0 +5\b", capsys.readouterr().out, re.MULTILINE)
    for option, message in {
        "--model.k=6": "k=6: the SAE in the checkpoint was trained with k=5",
        "--data.layer=2": "layer=2: the checkpoint was trained on 1",
        "--model.n_features=400": "holds TopKSAE.*n_features=300.*asks for .*n_features=400",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([*line, f"--ckpt_path={checkpoint}", option])


@pytest.mark.filterwarnings("ignore:Measured with what is in the checkpoint")
def test_a_folder_is_measured_as_its_checkpoint_is(tmp_path: Path, capsys):
    trained = {"model__k": "5", "model__n_features": "300", "data__layer": "1"}
    main(arguments("fit", "mutual_choice.yaml", **trained))
    run = tmp_path / "runs/mutual_choice/version_0"
    small = {key: value for key, value in SMALL.items() if key != "model.n_features"}
    line = ["test", "--config", "mutual_choice.yaml"]
    line += [f"--{key}={value}" for key, value in small.items()]
    tables = []
    for path in (run / "checkpoints/last.ckpt", run / "pretrained"):
        capsys.readouterr()
        main([*line, f"--ckpt_path={path}"])
        tables.append(re.findall(r"^(\w+ +[\d.,e+-]+)\b", capsys.readouterr().out, re.MULTILINE))
    assert len(tables[0]) > 10
    assert tables[0] == tables[1]
    for option, message in {
        "--model.k=6": "k=6: .*pretrained was trained with k=5",
        "--data.layer=2": "layer=2: the checkpoint was trained on 1",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([*line, f"--ckpt_path={run / 'pretrained'}", option])
    with pytest.raises(SystemExit, match="pretrained is a MutualChoiceSAE, not a TopKSAE"):
        main([*line, "--config=topk.yaml", f"--ckpt_path={run / 'pretrained'}"])


@pytest.mark.filterwarnings("ignore:Measured with what is in the checkpoint")
def test_an_sae_of_another_library_is_measured_as_ours_is(tmp_path: Path, capsys, monkeypatch):
    opened: list[Path] = []
    read = "lightning_sae.interop.sparsify.load_file"
    monkeypatch.setattr(read, lambda file: opened.append(file) or load_file(file))
    settings = {"model__k": "5", "model__n_features": "300", "model__normalize_inputs": "average"}
    main(arguments("fit", "topk.yaml", **settings))
    checkpoint = tmp_path / "runs/topk/version_0/checkpoints/last.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", "--to=sparsify", f"--output={tmp_path / 'out'}"])
    tables = []
    for config, path in (
        ("topk.yaml", checkpoint),
        ("mutual_choice.yaml", f"sparsify:{tmp_path / 'out'}"),
    ):
        small = [f"--{key}={value}" for key, value in SMALL.items() if key != "model.n_features"]
        capsys.readouterr()
        opened.clear()
        main(["test", "--config", config, *small, f"--ckpt_path={path}"])
        table = re.findall(r"^(fvu|l0|ce_spliced) +(\S+)", capsys.readouterr().out, re.M)
        tables.append({name: pytest.approx(float(value), rel=2e-3) for name, value in table})
    assert len(opened) == 1  # it may be of gigabytes
    assert len(tables[0]) == 3
    assert {name: value.expected for name, value in tables[0].items()} == tables[1]
    for line, told in {
        "fit": "fit needs a checkpoint to resume; model.start_from takes any trained SAE",
        "test": "sparsify:none: there is no such folder",
    }.items():
        with pytest.raises(SystemExit, match=told):
            main([line, "--config", "topk.yaml", *small, "--ckpt_path=sparsify:none"])


def test_another_k_than_the_checkpoint_s_is_told(tmp_path: Path):
    """LightningCLI by itself lets a checkpoint's k override the one on the command line, unsaid."""
    main(arguments("fit", "topk.yaml"))
    checkpoint = str(tmp_path / "runs/topk/version_0/checkpoints/last.ckpt")
    with pytest.raises(SystemExit, match="k=5: the SAE in the checkpoint was trained with k=16"):
        main(arguments("test", "topk.yaml", ckpt_path=checkpoint, model__k="5"))


def test_a_second_run_resumes_where_the_first_stopped(tmp_path: Path):
    main(arguments("fit", "mutual_choice.yaml", trainer__max_steps="2"))
    checkpoint = str(tmp_path / "runs/mutual_choice/version_0/checkpoints/last.ckpt")
    main(arguments("fit", "mutual_choice.yaml", ckpt_path=checkpoint))
    resumed = torch.load(
        tmp_path / "runs/mutual_choice/version_1/checkpoints/last.ckpt", weights_only=True
    )
    assert resumed["global_step"] == 4
    assert resumed["state_dict"]["history.tokens_seen"] == 4 * 512
    before = torch.load(checkpoint, weights_only=True)["state_dict"]["decoder.weight"]
    assert not torch.allclose(
        resumed["state_dict"]["decoder.weight"], before
    )  # not at a rate of zero


@pytest.mark.parametrize("model", ["gpt2_small", "pythia_160m", "vit"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_overlays_parse_with_every_architecture(name: str, model: str, monkeypatch):
    """And name a folder of their own for its runs."""
    made = []
    monkeypatch.setattr(SparseAutoencoderCLI, "instantiate_classes", lambda cli: made.append(cli))
    monkeypatch.setattr(SparseAutoencoderCLI, "_run_subcommand", lambda cli, subcommand: None)
    overlays = ["--config", f"models/{model}.yaml", "--config", "trainer/ddp.yaml"]
    main(["fit", "--config", f"{name}.yaml", *overlays])
    logger = made[0].config.fit.trainer.logger.init_args
    assert (logger.save_dir, logger.name) == (f"runs/{model}", name)


def test_a_large_dictionary_is_stepped_in_chunks(monkeypatch):
    made = []
    monkeypatch.setattr(SparseAutoencoderCLI, "instantiate_classes", lambda cli: made.append(cli))
    monkeypatch.setattr(SparseAutoencoderCLI, "_run_subcommand", lambda cli, subcommand: None)
    overlay = ["--config", "sizes/million_features.yaml", "--model.n_features", "4096"]
    main(["fit", "--config", "feature_choice.yaml", *overlay])
    optimizer = made[0].config.fit.model.init_args.optimizer
    assert optimizer.class_path == "lightning_sae.ChunkedAdam"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_optimizer_is_spelled_out(path: Path):
    """A class that a user swaps in would silently inherit what is left unsaid."""
    config = yaml.safe_load(path.read_text())
    if "model" in config:
        settings = config["model"]["init_args"]
        optimizer = settings.get("sae", {}).get("init_args", settings)["optimizer"]
        said = {"lr", "betas", "eps", "weight_decay"}
        if optimizer["class_path"] == "torch.optim.Adam":
            said.add("fused")
        assert set(optimizer["init_args"]) == said


def test_a_budget_below_one_match_a_feature_is_told(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(
            arguments(
                "fit", "feature_choice.yaml", model__n_features="9000", model__min_matches="1"
            )
        )
    assert_told(exit_, "batch_size=563 or min_matches", capsys)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_told(tmp_path: Path, capsys, monkeypatch):
    from lightning_sae.residual_stream import ResidualStream

    read = ResidualStream.read
    monkeypatch.setattr(ResidualStream, "read", lambda *args: read(*args) * torch.nan)
    with pytest.raises(SystemExit) as exit_:
        main(arguments("fit", "mutual_choice.yaml"))
    assert_told(exit_, "NaN", capsys)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_something_else_is_told(tmp_path: Path, capsys):
    main(arguments("fit", "topk.yaml"))
    checkpoint = str(tmp_path / "runs/topk/version_0/checkpoints/last.ckpt")
    for config, width in (("mutual_choice.yaml", "512"), ("topk.yaml", "256")):
        with pytest.raises(SystemExit) as exit_:
            main(arguments("test", config, ckpt_path=checkpoint, model__n_features=width))
        assert_told(exit_, "the checkpoint holds TopKSAE(d_model=256, n_features=512)", capsys)
    assert not (tmp_path / "runs/mutual_choice").exists()
    assert len(list((tmp_path / "runs/topk").iterdir())) == 1
    for settings in ({}, {"ckpt_path": "last"}):  # "last" of a folder without any
        with pytest.raises(SystemExit) as exit_:
            main(arguments("test", "topk.yaml", **settings))
        assert_told(exit_, "test needs the checkpoint or folder of a trained SAE", capsys)
    (tmp_path / "torn.ckpt").write_bytes(Path(checkpoint).read_bytes()[:1000])
    torch.save({"state_dict": print}, tmp_path / "code.ckpt")
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.ckpt")
    for name in ("torn.ckpt", "code.ckpt", "foreign.ckpt"):
        with pytest.raises(SystemExit) as exit_:
            main(arguments("test", "topk.yaml", ckpt_path=name))
        assert_told(exit_, f"ckpt_path={name} is no checkpoint of an SAE, or is damaged", capsys)


def assert_told(exit_: pytest.ExceptionInfo[SystemExit], told: str, capsys) -> None:
    """One line that starts with the program's name, and an exit code that is not zero."""
    message = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    line = message.strip().splitlines()[-1]
    assert line.startswith("lightning_sae: error: ")
    assert told in line
    assert "Traceback" not in message
    assert exit_.value.code != 0


def test_it_is_a_command_and_a_module(tmp_path: Path):
    command = [str(Path(sys.executable).parent / "lightning_sae")]
    module = [sys.executable, "-m", "lightning_sae"]
    for start in (command, module):
        version = subprocess.run(  # noqa: S603 - our own program
            [*start, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert lightning_sae.__version__ in version.stdout


def test_a_class_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the script too, in whose path this folder is not."""
    elsewhere = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(sys, "argv", ["lightning_sae", "fit", "--config", "topk.yaml"])
    sys.argv += ["--model", "my_sae.MySAE", "--model.k", "3"]
    (tmp_path / "my_sae.py").write_text(
        "from lightning_sae import TopKSAE\n\n\nclass MySAE(TopKSAE):\n    pass\n"
    )
    made = []
    monkeypatch.setattr(SparseAutoencoderCLI, "instantiate_classes", lambda cli: made.append(cli))
    monkeypatch.setattr(SparseAutoencoderCLI, "_run_subcommand", lambda cli, subcommand: None)
    main()
    assert made[0].config.fit.model.class_path == "my_sae.MySAE"


def test_a_wheel_carries_the_configurations_and_the_model(tmp_path: Path):
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(PACKAGE.parent))
    wheel = next(builder.build(directory=str(tmp_path), versions=["standard"]))
    unpacked = tmp_path / "unpacked"
    subprocess.run(  # noqa: S603 - our own wheel
        [sys.executable, "-m", "zipfile", "-e", wheel, str(unpacked)], check=True
    )
    package = unpacked / "lightning_sae"
    packaged = {path.relative_to(package / "configs") for path in package.rglob("*.yaml")}
    assert packaged == {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    others = ("py.typed", "quickstart/model.safetensors", "quickstart/text/train.parquet")
    for name in (*others, "report/page.html", "report/page.css", "report/page.js"):
        assert (package / name).is_file()


def test_a_run_may_be_stopped_and_kept_by_the_loss_recovered(tmp_path: Path):
    watched = [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val/loss_recovered_mean",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.patience=0",
        "--trainer.callbacks.min_delta=10",  # it is never so much better
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val/loss_recovered_mean",
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.filename=best-{step}",
    ]
    main([*arguments("fit", "topk.yaml", trainer__max_steps="8"), *watched])
    saved = tmp_path / "runs/topk/version_0/checkpoints"
    assert torch.load(saved / "last.ckpt", weights_only=True)["global_step"] == 4  # 2 validations
    assert [path.name for path in saved.glob("best-*.ckpt")] in (
        ["best-step=2.ckpt"],
        ["best-step=4.ckpt"],
    )
