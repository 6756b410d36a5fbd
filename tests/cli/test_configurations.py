"""Configurations by name."""

from pathlib import Path

from lightning_sae.cli.configurations import find_config, packaged_configs

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_local_configuration_comes_before_the_packaged_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("topk.yaml")).samefile(CONFIGS / "topk.yaml")
    assert Path(find_config("models/gpt2_small.yaml")).is_file()
    (tmp_path / "topk.yaml").write_text("trainer: {max_steps: 1}")
    assert Path(find_config("topk.yaml")) == Path("topk.yaml")
    assert find_config("nowhere.yaml") == "nowhere.yaml"


def test_all_that_ship_are_listed():
    there = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert set(packaged_configs()) == there
