"""SIGTERM and SIGINT while nothing is trained that could be saved."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_sae.callbacks.stop_on_signal import STOP, set_handler

__all__ = ["exit_on_signals"]


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Exit with 143 on SIGTERM and with 130 on SIGINT, at once but with `finally` clauses run."""
    before = set_handler(STOP, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
