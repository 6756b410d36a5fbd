"""What the tests of faults share: an empty folder to run in, and a small text."""

import sys
from pathlib import Path

import pytest

from tests.faults.runs import write_text


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in an empty folder, as a command of no arguments: Lightning would warn of pytest's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    """Runs a command line that must fail, and returns the one line that it says."""
    from lightning_sae.cli import main

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        said = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("lightning_sae: error: ")]
        assert len(lines) == 1
        assert said.rstrip().endswith(lines[0])
        assert "Traceback" not in said
        assert exit_.value.code not in (0, None)
        return lines[0]

    return run
