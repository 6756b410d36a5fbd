"""Where images come from: the Hugging Face hub or local files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lightning_sae.checks import UsageError
from lightning_sae.data.examples import Modality, load_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

__all__ = ["decode", "load_images"]

PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES: Final = Modality(
    argument="images",
    examples="images",
    builders={".parquet": "parquet", **dict.fromkeys(PICTURES, "imagefolder")},
)


def load_images(
    images: str,
    *,
    images_config: str | None,
    images_column: str,
    train_split: str,
    validation_split: str | None,
    held_out_images: int,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Open an image data set as training and held-out images, none of them in both.

    Nothing is decoded yet.

    Args:
        images: A hub data set, a folder of image or parquet files, or a parquet file.
        images_config: Configuration of the data set, where it has several.
        images_column: Column that holds the images.
        train_split: Split to train on.
        validation_split: Split to hold out. None: the split "validation" if there is one;
            otherwise images are taken out of the training split.
        held_out_images: How many, chosen at random.
        seed: Seed of that choice.

    Returns:
        Training and held-out images, in RGB, each with `images_column` as its only column.

    Raises:
        UsageError: If the data set, split or column does not exist, holds too few images, or
            something else.
    """
    from datasets import Image

    parts: Any = load_examples(
        IMAGES,
        images,
        path=images,
        config=images_config,
        column=images_column,
        train_split=train_split,
        validation_split=validation_split,
        held_out=held_out_images,
        streaming=False,
        seed=seed,
    )
    for part in parts:
        if not isinstance(part.features[images_column], Image):
            raise UsageError(
                f"images_column={images_column!r}: images={images!r} holds no images there"
            )
    train, held_out = (part.cast_column(images_column, Image(mode="RGB")) for part in parts)
    return train, held_out


def decode(images: Dataset, number: int) -> Image:
    """Return one image of a data set of `load_images`.

    Raises:
        UsageError: If it is damaged.
    """
    import datasets

    (column,) = images.column_names
    try:
        image: Image = images[number][column]
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, by format
        raw = images.cast_column(column, datasets.Image(decode=False))[number][column]
        raise UsageError(f"images: {raw['path'] or number} cannot be read: {error}") from error
    return image
