"""What constructors raise."""

import sys
from pathlib import Path
from typing import Union

import pytest
from lightning.pytorch import Callback

from lightning_sae.checks import UsageError
from lightning_sae.cli import main
from lightning_sae.cli.parser import Parser


class Part:
    def __init__(self, kind: str = "none") -> None:
        errors = {"value": ValueError, "import": ImportError, "ours": UsageError, "type": TypeError}
        if kind in errors:
            raise errors[kind](f"kind={kind}") from KeyError("its own cause")


def instantiate(kind: str, type_: type) -> object:
    parser = Parser()
    parser.add_argument("--part", type=type_)
    config = parser.parse_args([f"--part={__name__}.Part", f"--part.init_args.kind={kind}"])
    return parser.instantiate_classes(config).part


class Loop(Callback):
    def __init__(self, batches: Union[float, int, None] = None) -> None:  # noqa: UP007 - in this order
        self.batches = batches


@pytest.mark.parametrize(("given", "kind"), [("1", int), ("1.0", float), ("null", type(None))])
def test_a_number_of_batches_is_not_a_share_of_them(given: str, kind: type):
    parser = Parser()
    parser.add_lightning_class_args(Loop, "loop")
    assert type(parser.parse_args([f"--loop.batches={given}"]).loop.batches) is kind


class Maker(Parser):
    def get_defaults(self, *args, **kwargs):
        self.others = [Parser() for _ in range(9)]
        return super().get_defaults(*args, **kwargs)


def test_to_ask_parsers_for_their_keys_may_make_others(capsys):
    parsers = [Maker() for _ in range(3)]
    with pytest.raises(SystemExit):
        parsers[0].error("unrecognized arguments: --nosuch=1")
    assert "unrecognized arguments: --nosuch=1" in capsys.readouterr().err


TYPES = [Part, Part | None, str | Part]


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_what_a_constructor_raises_about_its_arguments_is_a_mistake_of_the_user(type_):
    assert isinstance(instantiate("none", type_), Part)
    for kind in ("value", "import", "ours"):
        with pytest.raises(UsageError) as error:
            instantiate(kind, type_)
        assert str(error.value) == f"kind={kind}"


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_anything_else_is_a_bug_and_comes_without_wrappings(type_):
    with pytest.raises(TypeError, match=r"^kind=type$") as error:
        instantiate("type", type_)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--data.model.nosuch=1", "unrecognized arguments: --data.model.nosuch=1"),
        ("--model.optimizer.nosuch=1", "error: Option 'model.optimizer.nosuch' is not accepted\n"),
        ("--model.optimizer.lr=x", "\"model.optimizer.lr\": Expected a <class 'float'>"),
        ("--model.k=x", "error: Parser key \"model.k\": Expected a <class 'int'>. Got value: x\n"),
    ],
)
def test_a_key_is_told_with_all_that_it_is_in(argument, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "topk.yaml", argument])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("trainer: {max_step: 3}", "option 'trainer.max_step', did you mean 'trainer.max_steps'?"),
        (
            "data: {init_args: {contxt_length: 3}}",
            "'data.contxt_length' is not accepted, did you mean",
        ),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitr: x}}]}",
            "ModelCheckpoint': Option 'trainer.callbacks.monitr' is not accepted, did you mean",
        ),
        (
            "model: {init_args: {optimizer: {init_args: {lrr: 1}}}}",
            "'model.optimizer.lrr' is not accepted, did you mean 'lr'?",
        ),
        ("model: {init_args: {nonsense: 1}}", "Option 'model.nonsense' is not accepted\n"),
    ],
)
def test_a_wrong_key_is_told_with_the_nearest_right_one(
    written, told, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    (tmp_path / "mine.yaml").write_text(written)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "topk.yaml", "--config", str(tmp_path / "mine.yaml")])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "fit --config topk.yaml --model.kk=5",
            "Option 'model.kk' is not accepted, did you mean 'k'?",
        ),
        ("fit --trainer.max_stepz=4", "--trainer.max_stepz=4, did you mean 'trainer.max_steps'?"),
        (
            "fit --model MutualChoice",
            "there is no class MutualChoice, did you mean 'MutualChoiceSAE'?",
        ),
        ("fit --model lightning_sae.TopSAE", "there is no class TopSAE, did you mean 'TopKSAE'?"),
        ("fit --config topk.yaml --model.optimizer Adm", "no class Adm, did you mean 'Adam'?"),
        ("fit --data Nonsense", 'Parser key "data": there is no class Nonsense\n'),
        (
            "fit --config topk.yml",
            "config=topk.yml: there is no such file, did you mean 'topk.yaml'?",
        ),
        (
            "fit --config gpt2",
            "config=gpt2: there is no such file, did you mean 'models/gpt2_small.yaml'?",
        ),
        ("report --tokns 3", "unrecognized arguments: --tokns 3, did you mean 'tokens'?"),
    ],
)
def test_what_is_misspelt_on_the_command_line_is_told_in_one_line(
    arguments, told, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["lightning_sae"])
    with pytest.raises(SystemExit):
        main(arguments.split())
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
