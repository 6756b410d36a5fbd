"""Messages of libraries that are no news to the user."""

import logging
import warnings

__all__ = ["silence_noise"]


def silence_noise() -> None:
    """Turn off messages of Lightning 2.6 that tell a user nothing."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # `test` logs to a new folder
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")  # and so used
    # What is logged at the end of a validation comes from metrics that all ranks have synchronised.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))
