"""Text that is streamed from a place that fails: asked again, or told in one line."""

import json
from pathlib import Path

import datasets
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from lightning_sae.cli import main
from lightning_sae.data import examples, packer
from tests.faults.runs import arguments, checkpoints, same, state
from tests.faults.test_last_checkpoint import EVERY_TWO_STEPS

LINES = [json.dumps({"text": f"{i} " + f"line = {i * i} and {i % 7} " * 5}) for i in range(400)]
STREAMED = {
    "data__streaming": "true",
    "data__text": "a/place",
    "trainer__callbacks": EVERY_TWO_STEPS,
    "trainer__max_steps": 30,
    "trainer__val_check_interval": 30,
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """Serves text as a hub does, a few documents at a time; a read can fail some times."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(
        examples, "_where", lambda *_: ("json", {"data_files": "memory://text.jsonl"})
    )
    monkeypatch.setattr(packer, "DOCUMENTS_AT_ONCE", 64)
    read = MemoryFile.read

    def set_up(lines: list[str], failures: int = 0) -> None:
        left = failures
        with fsspec.open("memory://text.jsonl", "w") as file:
            file.write("\n".join(lines))

        def flaky(file: MemoryFile, size: int = -1) -> bytes:
            nonlocal left
            if left and file.tell() > 20_000:
                left -= 1
                raise TimeoutError
            return read(file, size if size < 0 else min(size, 4096))

        monkeypatch.setattr(MemoryFile, "read", flaky)

    return set_up


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    folder.mkdir()
    monkeypatch.chdir(folder)
    main(arguments(**STREAMED))
    (last,) = folder.rglob("last.ckpt")
    return state(last)


def test_a_source_that_comes_back_is_not_noticed(serve, tmp_path: Path, monkeypatch):
    serve(LINES)
    expected = run(tmp_path / "whole", monkeypatch)
    serve(LINES, failures=19)  # as often as `datasets` asks again
    assert same(run(tmp_path / "failing", monkeypatch), expected)


def test_a_source_that_stays_away(serve, told, tmp_path: Path):
    serve(LINES, failures=20)
    assert "text cannot be read after document 128: Server Disconnected" in told(
        arguments(**STREAMED)
    )
    saved = checkpoints(tmp_path)
    assert len(saved) == 2
    assert all(state(path)["global_step"] > 2 for path in saved)


def test_a_source_that_is_broken_later(serve, told, tmp_path: Path):
    serve([*LINES[:250], "{", *LINES[250:]])
    line = told(arguments(**STREAMED))
    assert "text cannot be read after document 128: JSON parse error" in line
    assert len(checkpoints(tmp_path)) == 2
