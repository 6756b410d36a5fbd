"""Messages of libraries that are no news to the user."""

import logging
import warnings
from typing import Final

from transformers.utils.logging import disable_progress_bar

__all__ = ["silence_noise"]

NO_NEWS: Final = ("litlogger", "litmodels", "TPU available")
"""Words of advertisements, and of what nobody asked for."""


def silence_noise() -> None:
    """Turn off messages of Lightning 2.6 that tell a user nothing."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # `test` logs to a new folder
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")  # and so used
    # What is logged at the end of a validation comes from metrics that all ranks have synchronised.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it


def _is_news(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in NO_NEWS)
