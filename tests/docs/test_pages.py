"""Each block of Python on the pages runs, and each test that one defines passes."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {
    "max_steps=600": "max_steps=6",
    "=200,": "=3,",
    "layer=2, batch_size=2048)": "layer=2, batch_size=512, batches_per_block=4, "
    "validation_tokens=1024, test_tokens=1024)",
}
"""What makes a run of minutes one of seconds. Nothing else is changed."""


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page)],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
@pytest.mark.filterwarnings("default")  # pages are to be read, and may not be rid of all advice
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        source = block[1]
        for long, short in SHORTER.items():
            source = source.replace(long, short)
        lines_before = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + source, page, "exec"), names)  # noqa: S102
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        test()
