"""What a name that does not exist may be meant for."""

import pytest

from lightning_sae.cli.nearest import meant, with_nearest_class


def test_the_nearest_is_told_if_one_is_near():
    assert meant("max_stepz", ["min_steps", "max_steps"]) == ", did you mean 'max_steps'?"
    assert meant("nonsense", ["min_steps", "max_steps"]) == ""


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
