"""The API reference has every public name, and README.md is short."""

import importlib
import re
from pathlib import Path

import pytest

import lightning_sae

ROOT = Path(__file__).parents[2]
MODULES = {
    name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(), re.MULTILINE)
}
ROOMS = [
    "allocation",
    "architectures",
    "callbacks",
    "data",
    "interop",
    "interventions",
    "metrics",
    "optim",
    "parallel",
    "report",
]


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_documented_with_all_it_exports(room: str) -> None:
    name = f"lightning_sae.{room}"
    assert name in MODULES
    assert importlib.import_module(name).__all__  # what Sphinx goes by
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    assert any(f".. automodule:: {name}\n   :imported-members:\n" in page for page in pages)


def test_each_name_of_the_package_is_documented_in_a_room() -> None:
    documented = {}
    for name in MODULES:
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", None)
        if exported is None:  # Sphinx takes what is defined there
            exported = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == name]
        documented |= {id(getattr(module, each)): each for each in exported}
    public = {each for each in lightning_sae.__all__ if each != "__version__"}
    assert {each for each in public if id(getattr(lightning_sae, each)) not in documented} == set()


def test_the_index_of_the_reference_lists_the_package() -> None:
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = re.findall(r"^\| \[?`(\w+)`", index, re.MULTILINE)
    assert sorted(listed) == sorted(lightning_sae.__all__)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_report_of_an_sae_that_ships_is_linked_to_and_in_the_place_of_no_page() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    page = (ROOT / "docs" / "report.md").read_text()
    (name,) = re.findall(r'<a href="(\w+)\.html">', page)
    assert f"report={name}.html\n" in ci
    assert '--output "build/docs/$report"\n' in ci
    assert not (ROOT / "docs" / f"{name}.md").exists()


def test_each_local_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
