"""What the command says in one line, and what it lets pass."""

import errno
import os
import threading
import time

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sae.checks import UsageError
from lightning_sae.cli.errors import one_line, one_line_errors, refusals
from tests.callbacks.fakes import FakeSAE, tensors, trainer


class OurError(UsageError):
    """A subclass."""


TOLD: list[tuple[Exception, str]] = [
    (UsageError("k=0 is out of range"), "k=0 is out of range"),
    (OurError("two\n- lines:"), "two: lines"),
    (MisconfigurationException("devices=0"), "devices=0"),
    (PermissionError(errno.EACCES, "denied", "a.txt"), "[Errno 13] denied: 'a.txt'"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "[Errno 28] No space left on device"),
    (dist.DistNetworkError("no answer"), "another process of the run has ended, or hangs: no ans"),
    (
        RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore"),
        "another process of the run has ended, or hangs: [/gloo/transport",
    ),
]
BUGS = [ValueError("x"), TypeError("x"), RuntimeError("x"), KeyError("x"), OSError("x")]
BUGS += [OSError(errno.EBADF, "x"), ImportError("x"), AttributeError("x"), ZeroDivisionError("x")]


@pytest.mark.parametrize(("error", "expected"), TOLD, ids=[repr(error) for error, _ in TOLD])
def test_what_is_told(error: Exception, expected: str):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise error
    assert exit_.value.code.startswith(f"lightning_sae: error: {expected}")
    assert "\n" not in exit_.value.code


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_once(tmp_path, monkeypatch, capfd):
    """TensorBoard writes in a thread, whose traceback would stand beside the line."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("threading.excepthook", threading.__excepthook__)
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(
        type(logger.experiment.file_writer.event_writer._async_writer._writer), "write", full
    )

    def log() -> None:
        for step in range(1000):
            logger.log_metrics({"a": 1.0}, step)
            time.sleep(0.01)

    told = r"error: \[Errno 28\] No space left on device$"
    with pytest.raises(SystemExit, match=told), one_line_errors():
        log()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_metric_that_nobody_logs(tmp_path):
    class Logs(FakeSAE):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("train/loss", loss)
            return loss

    stop = EarlyStopping("train/los", check_on_train_epoch_end=True)
    told = r"metric `train/los` which is not available.* `train/loss`$"
    with pytest.raises(SystemExit, match=told), one_line_errors():
        trainer(tmp_path, stop).fit(Logs(), tensors(2))


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_what_passes(error: Exception):
    with pytest.raises(type(error)) as passed, one_line_errors():
        raise error
    assert passed.value is error


def test_refusals():
    with pytest.raises(UsageError, match=r"^x$") as error, refusals(ValueError, TypeError):
        raise TypeError("x")
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(OurError), refusals(ValueError):  # as it is
        raise OurError("x")
    with pytest.raises(KeyError), refusals(ValueError, TypeError):
        raise KeyError("x")


def test_one_line():
    message = (
        "Does not validate against any of\nSubtypes: [a]\nErrors:\n  - k=0 is bad\n- k=0 is bad"
    )
    assert one_line(message) == "lightning_sae: error: k=0 is bad"
