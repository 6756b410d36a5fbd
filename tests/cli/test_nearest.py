"""What a name that does not exist may be meant for."""

import pytest

from lightning_sae.cli.nearest import (
    meant,
    meant_file,
    with_nearest_class,
    with_nearest_value,
)


def test_the_nearest_is_told_if_one_is_near():
    assert meant("max_stepz", ["min_steps", "max_steps"]) == ", did you mean 'max_steps'?"
    assert meant("nonsense", ["min_steps", "max_steps"]) == ""


FILES = ["topk.yaml", "models/gpt2_small.yaml", "trainer/ddp.yaml", "mutual_choice.yaml"]
FILES += ["feature_choice.yaml"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "'models/gpt2_small.yaml'"),
        ("gpt2.yaml", "'models/gpt2_small.yaml'"),
        ("ddp", "'trainer/ddp.yaml'"),
        ("choice", "'feature_choice.yaml' or 'mutual_choice.yaml'"),
        ("configs/topk_sae.yaml", "'topk.yaml'"),
        ("mutualchoice", "'mutual_choice.yaml'"),
        ("models/gpt2smal.yaml", "'models/gpt2_small.yaml'"),
    ],
)
def test_a_file_is_found_by_what_its_name_contains_or_is_near_to(name, expected):
    assert meant_file(name, FILES) == f", did you mean {expected}?"


@pytest.mark.parametrize("name", ["nonsense", "a", "models/nonsense.yaml", ""])
def test_no_file_is_made_up(name):
    assert meant_file(name, FILES) == ""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "key: Expected a dot import path string: StoredActivationDataModule",
            "StoredActivationDataModule, did you mean 'StoredActivationsDataModule'?",
        ),
        (
            "key: Expected a dot import path string: TopK: Given value: TopK",
            "TopK, did you mean 'TopKSAE'?",
        ),
        ("key: module 'torch.optim' has no attribute 'AdamX'", "AdamX, did you mean 'Adam'?"),
        ("key: Expected a dot import path string: Whatever", "Whatever"),
    ],
)
def test_of_a_class_that_there_is_not_nothing_else_is_said(message, expected):
    assert with_nearest_class(message) == f"key: there is no class {expected}"


def test_other_messages_stay():
    assert with_nearest_class("k=0 is out of range") == "k=0 is out of range"
    assert with_nearest_value("k=0 is out of range") == "k=0 is out of range"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Expected a typing.Literal['saelens', 'sparsify']. Got value: saelen",
            "Expected one of 'saelens', 'sparsify'. Got value: saelen, did you mean 'saelens'?",
        ),
        (
            "a typing.Literal['16-true', 'bf16-mixed']: a typing.Literal['64']: Given value: bf16m",
            "one of '16-true', 'bf16-mixed': one of '64': Given value: bf16m, "
            "did you mean 'bf16-mixed'?",
        ),
        ("a typing.Literal['a', 'b']. Got value: zzz", "one of 'a', 'b'. Got value: zzz"),
        ("a typing.Literal['a', 'b']: no string", "one of 'a', 'b': no string"),
    ],
)
def test_of_a_value_that_is_none_of_a_few_these_are_told(message, expected):
    assert with_nearest_value(message) == expected
