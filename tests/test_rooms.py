"""The layout of the package: what a file may import, how long it is, where its tests are."""

import ast
import re
from pathlib import Path

import pytest

import lightning_sae

PACKAGE = Path(lightning_sae.__file__).parent
ROOMS = (
    ("cli", "__main__"),
    ("public",),
    ("interop",),
    ("architectures",),
    ("callbacks", "interventions", "report"),
    ("sae", "several_saes"),
    ("pretrained",),
    ("checkpointed", "record"),
    ("optim", "checkpoint_io", "checkpoint_format"),
    ("core",),
    ("sparse",),
    ("allocation",),
    ("selection",),
    ("kernels", "data", "metrics"),
    ("parallel",),
    (
        *("matches", "numerics", "zipf", "hooks", "layers", "residual_stream", "sites"),
        *("checks", "hyperparameters", "model_card", "tensor_files", "uncompiled", "quickstart"),
        *("several_sites", "part", "temporary", "host_copy"),
    ),
)
"""From the top. What stands in one line may import from each other, but for the ground."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = {
    ".".join(("lightning_sae", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
}


def imported(name: str) -> set[str]:
    """Return the package's files that a file imports, anywhere in it, but for type checking."""
    tree = ast.parse(FILES[name].read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_sae"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    files = {each if each in FILES else f"{each}.__init__" for each in found}
    return (files & FILES.keys()) - {name}


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_file_is_in_a_room():
    assert {room(name) for name in FILES} - {"__init__"} == LEVEL.keys()


def test_the_tour_names_each_room_and_only_files_that_there_are():
    tour = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    _, table = tour.split("## The rooms")
    assert {name for name in LEVEL if not re.search(rf"`{name}(/|\.py)`", table)} == {"__main__"}
    named = set(re.findall(r"`([\w/]+\.py)`", tour))
    assert not {file for file in named if not list(PACKAGE.rglob(file))}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str):
    level = {"__init__": LEVEL["public"]} | LEVEL  # whose names it gives
    above = {each for each in imported(name) if level[room(each)] < level[room(name)]}
    assert not above


def test_no_two_files_import_each_other():
    graph = {name: imported(name) for name in FILES if not name.endswith("__init__")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for each in graph.get(name, ()):
                visit(each, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", FILES)
def test_files_can_be_read_at_a_sitting(name: str):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= (250 if name == "lightning_sae.sae" else 300)


TESTED_WITH = {
    "allocation.choice": "allocation/test_feature_choice",  # a named tuple
    "checkpointed": "test_sae",
    "data.stream_datamodule": "data/test_frozen_model_datamodule",
    "layers": "residual_stream/test_layers",
    "optim.resumable": "test_sae",
    "metrics.runs": "metrics/test_loss_recovered",
    "residual_stream": "residual_stream/test_residual_stream",
    "sparse.gradient_form": "sparse/test_row_gradient",
    **{f"kernels.{path.stem}": "kernels/test_kernels" for path in PACKAGE.glob("kernels/*.py")},
}
"""Files that have no tests of their own, or have them elsewhere, and where."""


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__")])
def test_each_file_has_its_tests(name: str):
    *folders, file = name.split(".")[1:]
    where = TESTED_WITH.get(".".join((*folders, file)), "/".join((*folders, f"test_{file}")))
    assert (Path(__file__).parent / f"{where}.py").exists()
