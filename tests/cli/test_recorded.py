"""What is believed of a file that says what an SAE was trained on."""

import pytest

from lightning_sae import ActivationDataModule
from lightning_sae.cli.recorded import recorded_settings


def test_what_a_data_module_notes_makes_it_again():
    data = ActivationDataModule("quickstart", 1, context_length=64, batch_size=128, seed=3)
    settings = recorded_settings({"trained_on": data.describe()})
    again = ActivationDataModule(**settings)
    assert again.describe() == data.describe()
    assert "batch_size" not in settings


@pytest.mark.parametrize("setting", ["cache_dir", "validation_tokens", "batch_size", "nosuch"])
def test_what_it_does_not_note_is_not_believed(setting: str):
    noted = {"trained_on": {"model_name": "quickstart", setting: "/somewhere"}}
    assert recorded_settings(noted) == {"model_name": "quickstart"}


@pytest.mark.parametrize("record", [{}, {"trained_on": None}, {"trained_on": ["text"]}])
def test_a_record_that_says_nothing(record: dict):
    assert recorded_settings(record) == {}
