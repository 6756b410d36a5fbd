"""Advertisements and notes that are no news are not shown; everything else is."""

import logging
import warnings

import pytest

from lightning_sae.cli.noise import silence_noise


@pytest.fixture
def quiet():
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    filters = list(logger.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        silence_noise()
        yield logger
    logger.filters[:] = filters


def test_other_warnings_are_shown(quiet: logging.Logger):
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("The dirpath has changed from 'a' to 'b'", UserWarning, stacklevel=1)
        warnings.warn("something new", UserWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["something new"]


def test_other_messages_are_shown(quiet: logging.Logger, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger=quiet.name):
        quiet.addHandler(caplog.handler)
        quiet.info("Tip: try installing litlogger")
        quiet.info("GPU available: False")
        quiet.info("TPU available: False, using: 0 TPU cores")
        quiet.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"GPU available: False"}
