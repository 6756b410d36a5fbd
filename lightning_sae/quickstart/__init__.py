"""A small language model, a fixed sample of text, and SAEs, for trying the library offline.

`FOLDER` is a Transformers model folder (`AutoModelForCausalLM.from_pretrained(FOLDER)`), `TEXT`
holds `train.parquet` and `validation.parquet`, and `SAES` four trained SAEs. See
`README.md` beside this file for what they are and how they were made.
"""

from pathlib import Path
from typing import Final

from lightning_sae.checks import UsageError

__all__ = ["FOLDER", "SAES", "TEXT", "packaged_sae"]

FOLDER: Final[Path] = Path(__file__).resolve().parent
"""Folder of the packaged model and tokenizer."""

TEXT: Final[Path] = FOLDER / "text"
"""Folder of the packaged text: `train.parquet` and `validation.parquet`."""

SAES: Final[Path] = FOLDER / "saes"
"""Folder of the packaged SAEs, each in a folder of its own, as `save_pretrained` writes them."""


def packaged_sae(path: str | Path) -> str | Path:
    """Return the folder of a packaged SAE that is called `quickstart/NAME`; else what is given.

    Raises:
        UsageError: If there is no such one.
    """
    place, _, name = str(path).partition("/")
    if place != "quickstart" or not name or Path(path).exists():
        return path
    if not (SAES / name).is_dir():
        there = ", ".join(f"quickstart/{each.name}" for each in sorted(SAES.iterdir()))
        raise UsageError(f"{path} is none of the SAEs that ship: {there}")
    return SAES / name
