import re

import datasets
import pytest

from lightning_sae.data.images import decode, load_images
from tests.data.tiny import pictures, save_images

DEFAULTS = {
    "images_config": None,
    "images_column": "image",
    "train_split": "train",
    "validation_split": None,
    "held_out_images": 5,
    "seed": 0,
}


def load(images, **changed):
    """Training and held-out images, as lists of bytes."""
    parts = load_images(str(images), **{**DEFAULTS, **changed})
    return [[pixels(decode(part, i)) for i in range(len(part))] for part in parts]


def pixels(image):
    assert image.mode == "RGB"
    return image.size, image.tobytes()


def save_parquet(file, images, column="image"):
    rows = datasets.Dataset.from_dict({column: images, "id": range(len(images))})
    rows.cast_column(column, datasets.Image()).to_parquet(file)
    return file


def test_a_folder_of_images(tmp_path):
    train, held_out = load(save_images(tmp_path, 12))
    assert (len(train), len(held_out)) == (7, 5)
    assert sorted(train + held_out) == sorted(map(pixels, pictures(12)))
    assert load(tmp_path) == [train, held_out]
    assert load(tmp_path, seed=1)[1] != held_out


def test_a_folder_with_splits(tmp_path):
    save_images(tmp_path / "train", 6, seed=1)
    save_images(tmp_path / "validation", 8, seed=2)
    train, held_out = load(tmp_path)
    assert train == list(map(pixels, pictures(6, seed=1)))
    in_order = list(map(pixels, pictures(8, seed=2)))
    assert held_out != in_order  # they come sorted by class
    assert sorted(held_out) == sorted(in_order)


def test_a_parquet_file(tmp_path):
    file = save_parquet(tmp_path / "a.parquet", pictures(8), column="photo")
    train, held_out = load(file, images_column="photo")
    assert sorted(train + held_out) == sorted(map(pixels, pictures(8)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P", "CMYK"])
def test_all_become_rgb(tmp_path, mode):
    images = [picture.convert(mode) for picture in pictures(6)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.tif")
    train, held_out = load(tmp_path)
    assert sorted(train + held_out) == sorted(pixels(image.convert("RGB")) for image in images)


# `datasets` leaves the file of an image that cannot be decoded to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")
def test_a_damaged_image(tmp_path):
    (tmp_path / "class0").mkdir()
    for i in range(3):
        (tmp_path / "class0" / f"{i}.png").write_bytes(b"not an image")
    train, _ = load_images(str(tmp_path), **{**DEFAULTS, "held_out_images": 1})
    with pytest.raises(ValueError, match=r"^images: .*\d.png cannot be read: cannot ident") as told:
        decode(train, 0)
    assert "\n" not in str(told.value)
    buffer = save_images(tmp_path / "whole", 4) / "class1" / "002.png"
    buffer.write_bytes(buffer.read_bytes()[:-200])
    train, held_out = load_images(str(tmp_path / "whole"), **{**DEFAULTS, "held_out_images": 1})
    with pytest.raises(ValueError, match=r"^images: .*002.png cannot be read: "):
        _ = [decode(part, i) for part in (train, held_out) for i in range(len(part))]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images_column": "id"}, "images_column='id': images='FILE' holds no images there"),
        ({"images_column": "no"}, "images_column='no': images='FILE' has the columns image, id"),
        ({"train_split": "no"}, "train_split='no': images='FILE' has the splits train"),
        (
            {"held_out_images": 6},
            "held_out_images=6 leaves nothing to train on: images='FILE' has 6 images",
        ),
    ],
)
def test_wrong_choices(tmp_path, changed, message):
    file = save_parquet(tmp_path / "a.parquet", pictures(6))
    message = message.replace("FILE", str(file))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(file, **changed)


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^images='./no' does not exist$"):
        load("./no")
    (tmp_path / "a.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match=r"^images='.*a.pdf' should end in one of .parquet, .jpg"):
        load(tmp_path / "a.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^images='.*empty' cannot be read: .* any data files$"):
        load(tmp_path / "empty")


def test_a_name_with_the_word_of_a_split_leaves_no_image_out(tmp_path):
    for name in ("a.png", "b/train station.png", "b/test.flight.jpg"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        pictures(1)[0].save(file)
    train, held_out = load(tmp_path, held_out_images=1)
    assert len(train) + len(held_out) == 3
