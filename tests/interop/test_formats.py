"""Folders of other libraries, by the name of the library."""

import re
import tomllib
from pathlib import Path

import pytest

from lightning_sae import UsageError
from lightning_sae.interop import FORMATS, load_foreign
from tests.helpers.foreign import there_and_back, trained

ROOT = Path(__file__).parents[2]


def test_the_extra_brings_the_libraries_that_were_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["interop"]
    bounds = {re.match(r"[\w-]+", each)[0]: each for each in extra}
    assert bounds.keys() == {"sae-lens", "dictionary-learning", "eai-sparsify"}
    tried = (ROOT / "benchmarks" / "constraints.txt").read_text()
    page = (ROOT / "docs" / "exchange.md").read_text()
    assert "'.[interop]'" in page
    assert "'.[interop]'" in (ROOT / ".ci" / "interop").read_text()
    for name, bound in bounds.items():
        assert "," in bound  # from the version that was tried up to another major one
        (version,) = re.findall(rf"^{name}==(\d+\.\d+)", tried, re.MULTILINE)
        assert f"{name} {version}" in page


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_sae_is_told_in_one_line(name: str, tmp_path: Path):
    with pytest.raises(UsageError, match=f"^{name}:.*: there is no such folder"):
        load_foreign(f"{name}:{tmp_path / 'none'}")
    with pytest.raises(UsageError, match=f"is no SAE of {name}, or is damaged"):
        load_foreign(f"{name}:{tmp_path}")
    there_and_back(trained("topk"), name, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match=f"is no SAE of {name}, or is damaged"):
        load_foreign(f"{name}:{tmp_path}")


def test_the_name_of_a_library_comes_first(tmp_path: Path):
    with pytest.raises(UsageError, match="begins with none of saelens:, sparsify:, "):
        load_foreign(str(tmp_path))
