"""Tiny random models, documents and images, all on disk."""

import datasets
import pytest

from lightning_sae.data import ActivationDataModule, ImageActivationDataModule
from tests.data.tiny import (
    arguments,
    image_arguments,
    save_images,
    save_model,
    save_text,
    save_vision_model,
)


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


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def make_images(vision_folder, image_folder):
    def make_datamodule(**changed):
        arguments = image_arguments(vision_folder, image_folder)
        return ImageActivationDataModule(**{**arguments, **changed})

    return make_datamodule
