"""A signal while nothing is trained ends the process, after its `finally` clauses."""

import os
import signal

import pytest

from lightning_sae.cli.signals import exit_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_exits_with_its_code_and_what_was_open_is_closed(number: int, code: int):
    before, closed = signal.getsignal(number), []

    @exit_on_signals()
    def be_killed() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            closed.append(True)

    with pytest.raises(SystemExit) as raised:
        be_killed()
    assert raised.value.code == code
    assert closed
    assert signal.getsignal(number) is before
