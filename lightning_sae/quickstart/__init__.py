"""A small language model, a fixed sample of text, and SAEs, for trying the library offline.

`FOLDER` is a Transformers model folder (`AutoModelForCausalLM.from_pretrained(FOLDER)`), `TEXT`
holds `train.parquet` and `validation.parquet`, and `SAES` four trained SAEs. See
`README.md` beside this file for what they are and how they were made.
"""

from pathlib import Path
from typing import Final

__all__ = ["FOLDER", "SAES", "TEXT", "packaged_sae"]

FOLDER: Final[Path] = Path(__file__).resolve().parent
"""Folder of the packaged model and tokenizer."""

TEXT: Final[Path] = FOLDER / "text"
"""Folder of the packaged text: `train.parquet` and `validation.parquet`."""

SAES: Final[Path] = FOLDER / "saes"
"""Folder of the packaged SAEs, each in a folder of its own, as `save_pretrained` writes them."""


def packaged_sae(path: str | Path) -> str | Path:
    """Return the folder of a packaged SAE that is called `quickstart/NAME`; else what is given."""
    place, _, name = str(path).partition("/")
    folder = SAES / name
    if place == "quickstart" and name and folder.is_dir() and not Path(path).exists():
        return folder
    return path
