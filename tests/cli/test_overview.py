"""The first thing that a newcomer asks for."""

import pytest

from lightning_sae.cli import main


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
