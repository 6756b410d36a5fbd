"""A tiny random language model, its tokenizer and documents, all on disk."""

import datasets
import pytest

from lightning_sae.data import ActivationDataModule
from tests.data.tiny import arguments, save_model, save_text


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Tokenized text goes to a temporary folder, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture
def make(model_folder, text_file):
    def make_datamodule(**changed):
        return ActivationDataModule(**{**arguments(model_folder, text_file), **changed})

    return make_datamodule
