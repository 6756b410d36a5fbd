"""Where in a command line the settings of a checkpoint go, and which they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lightning_sae import TopKSAE
from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH
from lightning_sae.cli.from_checkpoint import with_its_settings

STATE = {
    KEY: FORMAT,
    "architecture": "TopKSAE",
    "hyper_parameters": {"d_model": 8, "n_features": 32, "k": 99},
    TRAINED_WITH: {"k": 4, "importance": "affinity"},
    "state_dict": {},
    "ActivationDataModule": {
        "activations": {"model_name": "m", "weights": "ab", "layer": 0, "model_dtype": "float32"}
    },
}
CLASS = "--model=lightning_sae.TopKSAE"
OF_MODEL = [CLASS, "--model.n_features=32", "--model.k=4", "--model.importance=affinity"]
OF_DATA = ["--data.model_name=m", "--data.layer=0", "--data.model_dtype=float32"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "trained.ckpt")
    return tmp_path / "trained.ckpt"


class MeasuredSAE(TopKSAE):
    """One of the user's."""


def config(path: Any, model: str = "TopKSAE", data: str = "ActivationDataModule") -> Namespace:
    return Namespace(
        ckpt_path=str(path),
        model=Namespace(class_path=f"lightning_sae.{model}"),
        data=Namespace(
            class_path=f"lightning_sae.{data}",
            init_args=Namespace(model_name="x", layer=2, model_dtype="float32", seed=0),
        ),
    )


@pytest.mark.parametrize("packaged", [["--config", "topk.yaml"], ["--config=topk.yaml"]])
def test_they_come_after_the_packaged_configurations(packaged: list[str], checkpoint: Path):
    Path("mine.yaml").touch()
    before, after = ["test", *packaged], ["-c", "mine.yaml", "--model.k=5"]
    found = with_its_settings([*before, *after], config(checkpoint))
    assert found == [*before, *OF_MODEL, *OF_DATA, *after]
    overlay = ["--config", "models/gpt2_small.yaml"]
    found = with_its_settings([*before, *overlay, *after], config(checkpoint))
    assert found == [*before, *overlay, *OF_MODEL, *OF_DATA, *after]


@pytest.mark.parametrize("own", [["-c", "mine.yaml"], ["--model.k=5"], ["--data.layer", "1"]])
def test_what_the_user_says_is_not_overruled(own: list[str], checkpoint: Path):
    Path("mine.yaml").touch()
    line = ["test", "--config", "topk.yaml", *own, "--config", "trainer/ddp.yaml"]
    found = with_its_settings(line, config(checkpoint))
    assert found == [*line[:3], *OF_MODEL, *OF_DATA, *line[3:]]
    line = ["test", *own, "--config", "trainer/ddp.yaml"]
    assert with_its_settings(line, config(checkpoint)) == line


def test_a_class_of_the_user_s_is_given_what_it_takes(checkpoint: Path):
    line, own = ["test", "--config", "topk.yaml"], config(checkpoint)
    del own.data.init_args["model_name"]
    assert with_its_settings(line, own) == [*line, *OF_MODEL, *OF_DATA[1:]]


def test_nothing_else_is_believed_of_a_checkpoint(checkpoint: Path):
    noted = STATE["ActivationDataModule"]["activations"] | {"cache_dir": "elsewhere"}
    torch.save(STATE | {"ActivationDataModule": {"activations": noted}}, checkpoint)
    line, asked = ["test", "--config", "topk.yaml"], config(checkpoint)
    asked.data.init_args["cache_dir"] = None
    assert with_its_settings(line, asked) == [*line, *OF_MODEL, *OF_DATA]


def test_a_class_that_extends_the_trained_one_is_given_its_settings(checkpoint: Path):
    line, own = ["test", "--config", "topk.yaml"], config(checkpoint)
    own.model.class_path = f"{__name__}.MeasuredSAE"
    found = with_its_settings(line, own)
    assert found == [*line, f"--model={__name__}.MeasuredSAE", *OF_MODEL[1:], *OF_DATA]


def test_a_user_s_own_configuration_is_all_the_user_s(checkpoint: Path):
    Path("topk.yaml").touch()  # of the same name as one that ships
    line = ["test", "--config", "topk.yaml"]
    assert with_its_settings(line, config(checkpoint)) == line


def test_other_classes_are_left_to_be_refused(checkpoint: Path):
    line = ["test", "--config", "topk.yaml"]
    assert with_its_settings(line, config(checkpoint, model="StandardSAE")) == [*line, *OF_DATA]
    of_images = config(checkpoint, data="ImageActivationDataModule")
    assert with_its_settings(line, of_images) == [*line, *OF_MODEL]


@pytest.mark.parametrize("path", ["absent.ckpt", "broken.ckpt", ""])
def test_what_is_no_checkpoint_is_told_later(path: str, checkpoint: Path):
    Path("broken.ckpt").write_text("nothing")
    line = ["test", "--config", "topk.yaml"]
    assert with_its_settings(line, config(path)) == line


def test_a_checkpoint_of_format_1_gives_what_it_has(checkpoint: Path):
    arguments = STATE["hyper_parameters"] | {"importance": "gain", "aux_every": 3}
    torch.save(
        {"architecture": "TopKSAE", "state_dict": {}, "hyper_parameters": arguments}, checkpoint
    )
    line = ["test", "--config", "topk.yaml"]
    settings = ["n_features=32", "k=99", "importance=gain", "normalize_inputs=average"]
    expected = [*line, CLASS, *(f"--model.{setting}" for setting in settings)]
    assert with_its_settings(line, config(checkpoint)) == expected


def test_a_checkpoint_of_format_2_had_one_scale_for_all_tokens(checkpoint: Path):
    torch.save(STATE | {KEY: 2}, checkpoint)
    line = ["test", "--config", "topk.yaml"]
    found = with_its_settings(line, config(checkpoint))
    assert found == [*line, *OF_MODEL, "--model.normalize_inputs=average", *OF_DATA]


class WarmSAE(TopKSAE):
    """One of the user's, with a setting more on which codes depend."""

    code_settings = (*TopKSAE.code_settings, "temperature")

    def __init__(self, d_model: int, n_features: int, k: int, temperature: float = 1.0) -> None:
        super().__init__(d_model, n_features, k)
        self.save_hyperparameters()


def test_a_folder_brings_what_its_checkpoint_would(tmp_path: Path, monkeypatch):
    sae = WarmSAE(8, 32, 4, temperature=0.5)
    sae.record = {"trained_on": {"model_name": "m", "layer": 0, "text": "t"}}
    sae.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr("lightning_sae.WarmSAE", WarmSAE, raising=False)
    line = ["test", "--config", "topk.yaml"]
    found = with_its_settings(line, config(tmp_path / "folder", model="WarmSAE"))
    settings = ["n_features=32", "k=4", "importance=affinity", "normalize_inputs=token"]
    expected = [f"--model.{setting}" for setting in (*settings, "temperature=0.5")]
    expected += ["--model=lightning_sae.WarmSAE", "--data.model_name=m", "--data.layer=0"]
    assert sorted(found[len(line) :]) == sorted(expected)
