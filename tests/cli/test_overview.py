"""The first thing that a newcomer asks for."""

import inspect

import pytest

from lightning_sae.cli import main
from lightning_sae.cli.cache import fill_cache
from lightning_sae.cli.command import COMMANDS
from lightning_sae.cli.overview import SENTENCES


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
