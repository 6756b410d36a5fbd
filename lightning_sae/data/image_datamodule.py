"""The data module for images: batches of a vision transformer's activations."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.data.frozen_model import Dtype
from lightning_sae.data.frozen_model_datamodule import FrozenModelDataModule
from lightning_sae.data.images import decode, load_images
from lightning_sae.data.vision_model import VisionModel
from lightning_sae.sites import Layers, Sites

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

__all__ = ["ImageActivationDataModule"]


class ImageActivationDataModule(FrozenModelDataModule):
    """Activations of one layer of a vision transformer, in the same stream as those of text.

    Tokens are the patches of images. The tokens before them (class, distillation, registers) are
    read by the model but never trained or measured on, as position 0 is in text. See
    `FrozenModelDataModule` for the batches; those held out tell in `image_numbers` which images
    they are of, as `image` counts them, and their tokens are the patches of each, row by row.

    Args:
        model_name: Vision transformer to read: a Hugging Face hub id or a folder. Its own image
            processor resizes and normalizes the images.
        layer: Block whose output is read, from 0, or the path of a module, as in
            `model.named_modules()`. A list: several, whose activations are beside each other.
        images: Images to read it on: a Hugging Face hub data set, a folder of image files, or
            parquet files with a column of images.
        site: What of the block is read: the residual stream after it, or another of
            `lightning_sae.sites.Site`. A list: several, each of each layer.
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
        cache_dtype: What they are rounded to, for all that is trained and measured on, whether it
            was kept before or not: float16 takes half the space of float32. None: as they are.
        cache_limit_gb: Gigabytes that they may take. A run that would keep more is refused before
            it begins, where its length is known; any other keeps no more from there on.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range. Models and images that cannot be read are
            noticed when first needed.
    """

    noun: ClassVar[str] = "images"
    input_key: ClassVar[str] = "image_numbers"
    place: ClassVar[tuple[str, ...]] = (
        *FrozenModelDataModule.place,
        *("images", "images_config", "images_column", "train_split", "validation_split"),
        "held_out_images",
    )
    positions: ClassVar[str] = "patches"
    model: VisionModel

    def __init__(
        self,
        model_name: str,
        layer: Layers,
        images: str,
        *,
        site: Sites = "resid_post",
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
        cache_dtype: Dtype | None = None,
        cache_limit_gb: float = 100,
        seed: int = 0,
    ) -> None:
        require_positive(held_out_images=held_out_images)
        super().__init__(
            VisionModel(model_name, layer, site=site, revision=model_revision, dtype=model_dtype),
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            model_batch_size=model_batch_size,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            cache_dir=cache_dir,
            cache_dtype=cache_dtype,
            cache_limit_gb=cache_limit_gb,
            seed=seed,
        )
        self.save_hyperparameters()
        self.images = str(images)  # a `Path` will do
        self.source = f"images={self.images!r}"
        self.images_config = images_config
        self.images_column = images_column
        self.train_split = train_split
        self.validation_split = validation_split
        self.held_out_images = held_out_images

    @property
    def positions_per_input(self) -> int:
        """Patches of an image."""
        return self.model.patches

    def train_inputs(self) -> Tensor:
        """Return the numbers of the images to train on: those after the held-out ones."""
        train, held_out = self._images
        return torch.arange(len(held_out), len(held_out) + len(train))

    def held_out_inputs(self) -> Tensor:
        """Return the numbers of the held-out images, from 0."""
        return torch.arange(len(self._images[1]))

    def read(self, inputs: Tensor) -> Tensor:
        """Return the activations of the patches of the images of these numbers."""
        # Each process decodes its own.
        pixels = [self.model.pixels(self.image(number)) for number in inputs.tolist()]
        return super().read(torch.stack(pixels))

    def image(self, number: int) -> Image:
        """Return the image of this number, in RGB: held-out images come first, from 0.

        Raises:
            UsageError: If it is damaged.
        """
        train, held_out = self._images
        if number < len(held_out):
            return decode(held_out, number)
        return decode(train, number - len(held_out))

    @cached_property
    def _images(self) -> tuple[Dataset, Dataset]:
        """Images to train on and held-out images."""
        _ = self.model.patches  # first, to find a mistake in it before reading the images
        return load_images(
            self.images,
            images_config=self.images_config,
            images_column=self.images_column,
            train_split=self.train_split,
            validation_split=self.validation_split,
            held_out_images=self.held_out_images,
            seed=self.seed,
        )
