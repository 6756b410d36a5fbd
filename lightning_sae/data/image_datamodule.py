"""The data module for images: batches of a vision transformer's activations."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from lightning_sae.data.base import FrozenModelDataModule
from lightning_sae.data.contexts import Contexts, ShuffledRows, held_out_parts
from lightning_sae.data.frozen_model import Dtype
from lightning_sae.data.images import decode, load_images
from lightning_sae.data.modality import IMAGES, Modality
from lightning_sae.data.stream import Read
from lightning_sae.data.vision_model import VisionModel

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImageActivationDataModule"]

SOURCE: Final = tuple(inspect.signature(load_images).parameters)
"""The arguments that `load_images` takes from the data module."""


class ImageActivationDataModule(FrozenModelDataModule):
    """Activations of one layer of a vision transformer, in the same stream as those of text.

    Tokens are the patches of images. The tokens before them (class, distillation, registers) are
    read by the model but never trained or measured on, as position 0 is in text. See
    `FrozenModelDataModule` for the batches; those held out tell in `image_numbers` which of the
    `held_out_images` they are of, and their tokens are the patches of each image, row by row.

    Args:
        model_name: Vision transformer to read: a Hugging Face hub id or a folder. Its own image
            processor resizes and normalizes the images.
        layer: Block whose output is read, from 0.
        images: Images to read it on: a Hugging Face hub data set, a folder of image files, or
            parquet files with a column of images.
        model_revision: Branch, tag or commit of the model on the hub.
        images_config: Configuration of the data set, where it has several.
        images_column: Column that holds the images.
        train_split: Split to train on.
        validation_split: Split to validate and test on. None: the one called "validation" if
            there is one; otherwise images are held out of the training split.
        held_out_images: Images to hold out of the training split, at random, where nothing else is
            there to validate on.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        model_batch_size: Images of one forward pass of the model.
        model_dtype: What the model computes in.
        validation_tokens: Tokens of held-out images to validate on, in whole images.
        test_tokens: Tokens of held-out images to test on: those that come after.
        cache_dir: Folder to keep activations in; runs that need the same ones then do not
            compute them, nor load the model, though they decode the images. None: keep none.
        seed: Seed of every choice and shuffle.

    Raises:
        ValueError: An argument is out of its range. Models and images that cannot be read are
            noticed when first needed.
    """

    modality: ClassVar[Modality] = IMAGES
    place: ClassVar[tuple[str, ...]] = (*SOURCE, "model_name", "batch_size", "batches_per_block")

    def __init__(
        self,
        model_name: str,
        layer: int,
        images: str,
        *,
        model_revision: str | None = None,
        images_config: str | None = None,
        images_column: str = "image",
        train_split: str = "train",
        validation_split: str | None = None,
        held_out_images: int = 1000,
        batch_size: int = 4096,
        batches_per_block: int = 32,
        model_batch_size: int = 32,
        model_dtype: Dtype = "float32",
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            VisionModel(model_name, layer, revision=model_revision, dtype=model_dtype),
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            lm_batch_size=model_batch_size,
            cache_dir=cache_dir,
            seed=seed,
        )
        self.save_hyperparameters()
        least = {"layer": 0, "held_out_images": 1, "batch_size": 1, "batches_per_block": 1}
        least |= {"model_batch_size": 1, "validation_tokens": 1, "test_tokens": 1, "seed": 0}
        self._check_at_least(least)
        self._model: VisionModel

    @property
    def held_out_images(self) -> Dataset:
        """The images that `image_numbers` count, as `datasets` decodes them."""
        return self._images[1]

    def _tokens_per_input(self) -> int:
        return self._model.patches

    def _kept(self, inputs: Tensor) -> Tensor:
        return torch.ones(len(inputs), self._model.patches, dtype=torch.bool)

    def _train_inputs(self) -> tuple[Contexts, Read]:
        images, name = self._images[0], self.hparams["images"]
        return ShuffledRows(len(images), self.seed, name, IMAGES), self._reader(images)

    def _held_out_inputs(self, stage: str) -> tuple[Tensor, Read]:
        return self._held_out_numbers[stage], self._reader(self.held_out_images)

    @cached_property
    def _images(self) -> tuple[Dataset, Dataset]:
        """Images to train on and held-out images."""
        _ = self._model.patches  # first, to find a mistake in it before reading the images
        return load_images(**{name: self.hparams[name] for name in SOURCE})

    @cached_property
    def _held_out_numbers(self) -> dict[str, Tensor]:
        self._check_at_least(
            dict.fromkeys(("validation_tokens", "test_tokens"), self._model.patches)
        )
        wanted = {
            stage: self.hparams[f"{stage}_tokens"] // self._model.patches
            for stage in ("validation", "test")
        }
        numbers = torch.arange(len(self.held_out_images))
        return held_out_parts(numbers, IMAGES, self.hparams["images"], **wanted)

    def _reader(self, images: Dataset) -> Read:
        """What reads the patches of the images of these numbers: each rank decodes its own."""
        read = self._model.reader(self._device, self.cache_dir)

        def read_numbers(numbers: Tensor) -> Tensor:
            pixels = [self._model.pixels(decode(images, number)) for number in numbers.tolist()]
            return read(torch.stack(pixels))  # (images, patches, d_model)

        return read_numbers
