"""The first thing that a newcomer asks for."""

import inspect
import re
import sys

import pytest

from lightning_sae.cli import main
from lightning_sae.cli.cache import fill_cache
from lightning_sae.cli.command import COMMANDS
from lightning_sae.cli.overview import SENTENCES, opening


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_it_tells_of_every_command_and_configuration(asked, capsys):
    main([asked])
    told = capsys.readouterr().out
    commands = ["fit", "validate", "test", "predict", "report", "export", "import", "cache"]
    listed = (line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  "))
    lines = dict(pair for pair in listed if len(pair) == 2)
    assert [name for name in lines if name in commands] == commands
    assert all(lines[name].endswith(".") for name in commands)
    assert "models/gpt2_small.yaml" in told
    assert "lightning_sae fit --config mutual_choice.yaml" in told
    assert max(map(len, told.splitlines())) <= 100


def test_it_says_what_the_commands_say_themselves():
    said = {**COMMANDS, "cache": fill_cache}
    docstrings = {name: inspect.getdoc(each).splitlines()[0] for name, each in said.items()}
    assert {name: SENTENCES[name] for name in said} == docstrings


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "cache"])
def test_help_of_a_command_begins_with_what_a_newcomer_needs(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    usage, _, sentence, *rest = capsys.readouterr().out.splitlines()
    assert usage == f"usage: lightning_sae {command} [--config FILE ...] [--KEY VALUE ...]"
    assert sentence == SENTENCES[command]
    if command != "cache":
        assert any(f"lightning_sae {command} --config topk.yaml" in line for line in rest[:3])
        assert rest.index("options:") < 16


@pytest.mark.parametrize("command", ["fit", "test"])
def test_its_examples_are_understood(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    examples = re.findall(r"^  lightning_sae (.+)$", opening(command)["description"], re.MULTILINE)
    assert {each.split()[0] for each in examples} == {command}
    for example in examples:
        asks = ".help " in example
        with pytest.raises(SystemExit) as exit_:
            main([*example.split(), *([] if asks else ["--print_config"])])
        assert exit_.value.code == 0, example
        assert ("--model.k K" if asks else "class_path: ") in capsys.readouterr().out
