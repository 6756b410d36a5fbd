"""A small language model and a fixed sample of text, for trying the library offline.

`FOLDER` is a Transformers model folder (`AutoModelForCausalLM.from_pretrained(FOLDER)`), and
`TEXT` holds `train.parquet` and `validation.parquet`. See `README.md` beside this file for what
they are and how `make.py` made them.
"""

from pathlib import Path
from typing import Final

__all__ = ["FOLDER", "TEXT"]

FOLDER: Final[Path] = Path(__file__).resolve().parent
"""Folder of the packaged model and tokenizer."""

TEXT: Final[Path] = FOLDER / "text"
"""Folder of the packaged text: `train.parquet` and `validation.parquet`."""
