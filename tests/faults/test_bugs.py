"""A bug is no mistake at the command line: it keeps its class, its message and its traceback."""

import traceback

import pytest

from lightning_sae.cli import main
from tests.faults.runs import arguments

BUGS: list[tuple[str, str, type[Exception], str]] = [
    ("model", "InConstructor", AttributeError, "no attribute 'forgotten'"),
    ("model", "InStep", AttributeError, "no attribute 'forgotten'"),
    ("model", "InTorch", ValueError, "optimizer got an empty parameter list"),
    ("model", "InLightning", ValueError, "values cannot be logged"),
    ("trainer.callbacks", "InCallback", ValueError, "invalid literal for int"),
    ("trainer.callbacks", "InCallbackConstructor", KeyError, "forgotten"),
    ("trainer.strategy", "InStrategyConstructor", ZeroDivisionError, "of a strategy"),
]


@pytest.mark.parametrize(
    ("key", "name", "kind", "message"), BUGS, ids=[name for _, name, _, _ in BUGS]
)
def test_a_bug_keeps_its_traceback(key, name, kind, message, text, capsys):
    path, line = f"tests.faults.bugs.{name}", arguments(data__text=text)
    if key == "model":
        line[3:3] = [f"--model={path}", "--model.k=3"]  # before its other arguments
    else:
        line.append(f'--{key}={{"class_path": "{path}"}}')
    with pytest.raises(kind, match=message) as error:
        main(line)
    assert error.type is kind
    frames = traceback.extract_tb(error.value.__traceback__)
    assert any(frame.filename.endswith("tests/faults/bugs.py") for frame in frames)
    assert "lightning_sae: error" not in capsys.readouterr().err
