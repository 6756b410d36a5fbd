"""What the command answers before it imports anything, and what it hands on."""

import re
import subprocess
import sys

import pytest

import lightning_sae
from lightning_sae import cli
from lightning_sae.cli import main
from lightning_sae.cli.overview import overview

VERSION = f"lightning_sae {lightning_sae.__version__}\n"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("--help", overview()),
        ("-h", overview()),
        ("help", overview()),
        ("--help fit", overview()),
        ("--version", VERSION),
        ("", None),
    ],
)
def test_a_page_of_text_needs_no_library(asked: str, told: str | None):
    start = [sys.executable, "-X", "importtime", "-m", "lightning_sae"]
    done = subprocess.run(  # noqa: S603 - our own program
        [*start, *asked.split()], capture_output=True, text=True, check=False
    )
    timed = re.compile(r"^import time: .*\| +([\w.]+)\n", re.MULTILINE)
    imported = {name.split(".")[0] for name in timed.findall(done.stderr)}
    assert "lightning_sae" in imported
    assert not imported & {"torch", "lightning", "transformers", "jsonargparse", "numpy"}
    if told is None:  # no command is a mistake: nothing for those who read the output
        assert (done.returncode, done.stdout) == (2, "")
        assert overview() in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, told)


def test_help_of_a_command_is_its_own(capsys):
    told = []
    for asked in (["help", "report"], ["report", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(asked)
        assert exit_.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert told[0].startswith("usage: lightning_sae report ")


def test_the_process_s_arguments_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_sae", "--version"])
    main()
    assert capsys.readouterr().out == VERSION
    monkeypatch.setattr(sys, "argv", ["lightning_sae", "nonsense"])
    with pytest.raises(SystemExit, match="nonsense is none of fit, validate, "):
        main()


def test_the_class_is_there_when_it_is_asked_for():
    assert cli.SparseAutoencoderCLI.__module__ == "lightning_sae.cli.command"
    assert set(cli.__all__) <= set(dir(cli))
    with pytest.raises(AttributeError, match=r"'lightning_sae\.cli' has no attribute 'Nonsense'"):
        _ = cli.Nonsense
