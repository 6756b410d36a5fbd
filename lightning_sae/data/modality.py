"""What the two kinds of data are called, in arguments, batches and messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["IMAGES", "TEXT", "Modality"]


@dataclass(frozen=True)
class Modality:
    """The words for one kind of data.

    Attributes:
        argument: The argument that names the data set, which is the word for the data too. Those
            of its column and its configuration begin with it.
        examples: The rows of a data set, as in the argument that says how many to hold out.
        inputs: What the model reads at once.
        key: Under which name a held-out batch tells which inputs are in it.
        builders: What `datasets` calls the format of a file, by the end of its name.
    """

    argument: str
    examples: str
    inputs: str
    key: str
    builders: Mapping[str, str]


TEXT: Final = Modality(
    argument="text",
    examples="documents",
    inputs="contexts",
    key="input_ids",
    builders={".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"},
)
IMAGES: Final = Modality(
    argument="images",
    examples="images",
    inputs="images",
    key="image_numbers",
    builders={".parquet": "parquet"},
)
