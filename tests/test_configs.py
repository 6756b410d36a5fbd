"""What ships beside the code: each key of a configuration is explained, and none is missing."""

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_sae

CONFIGS = Path(__file__).parent.parent / "configs"
ALL = sorted(CONFIGS.rglob("*.yaml"))
ARCHITECTURES = sorted(CONFIGS.glob("*.yaml"))


def described(path: Path, part: str) -> dict:
    """What a configuration says of the SAE, or the data: of several SAEs, of each."""
    found = yaml.safe_load(path.read_text())[part]
    return found["init_args"].get("sae", found)


def unexplained(text: str) -> list[str]:
    """The lines that give a value and do not say what it is for."""
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    holds_others = re.compile(r"[ -]*\w+:( #.*)?")
    explained = re.compile(r"[ -]*\w+: [^#{]+ # \S.*")
    return [line for line in lines if not (holds_others.fullmatch(line) or explained.match(line))]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_each_key_is_explained_on_its_line(path: Path):
    text = path.read_text()
    assert not unexplained(text)
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("line", ["k: 16", "k: 16 #", "- k: 16", "init_args: {k: 16} # both", "16"])
def test_a_line_without_an_explanation_is_found(line: str):
    around = "# a comment\n\nmodel: # holds others\n  class_path: A # what\n"
    assert unexplained(f"{around}    {line}\n  last: [1, 2] # two\n") == [f"    {line}"]


@pytest.mark.parametrize("part", ["model", "data"])
@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_all_arguments_are_there(path: Path, part: str):
    """And no others."""
    config = described(path, part)
    parser = ArgumentParser()
    made = getattr(lightning_sae, config["class_path"].removeprefix("lightning_sae."))
    parser.add_class_arguments(made, part, skip={"d_model", "d_target"})  # by the data
    assert set(config["init_args"]) == set(vars(parser.get_defaults()[part]))


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_what_pairs_are_ranked_by_is_the_same_in_python(path: Path):
    """So that a checkpoint of the one can be tested with the other."""
    config = described(path, "model")
    made = getattr(lightning_sae, config["class_path"].removeprefix("lightning_sae."))
    others = {
        key: config["init_args"][key] for key in ("n_features", "k") if key in config["init_args"]
    }
    sae = made(d_model=8, **others)
    assert sae.importance == config["init_args"].get("importance", "affinity")


@pytest.mark.parametrize(
    "path",
    [path for path in ALL if path.parent.name in ("models", "data", "sizes")],
    ids=lambda path: path.stem,
)
def test_what_trains_on_something_else_has_runs_of_its_own(path: Path):
    logger = yaml.safe_load(path.read_text())["trainer"]["logger"]
    assert logger == {"init_args": {"save_dir": f"runs/{path.stem}"}}  # and keeps the user's class
