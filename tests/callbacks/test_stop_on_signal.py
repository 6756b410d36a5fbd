"""In a project of somebody else; `tests/faults/test_signals.py` sends signals to the command."""

import signal
import threading

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_sae.callbacks import StopOnSignal
from lightning_sae.callbacks.stop_on_signal import STOP, set_handler
from tests.callbacks.fakes import TOKENS, FakeSAE, tensors, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Signalled(FakeSAE):
    """Is sent a signal in the middle of its third step."""

    number: int | None

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("train/loss", loss)
        if self.number and self.trainer.global_step == 2:
            signal.raise_signal(self.number)
        return loss


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fit_ends_after_the_step_with_a_checkpoint(number, code, tmp_path):
    handlers = [signal.getsignal(each) for each in STOP]
    stop, module, logger = StopOnSignal(), Signalled(), CSVLogger(tmp_path, name="")
    module.number = number
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    run = trainer(tmp_path, stop, save, enable_checkpointing=True, logger=logger)
    with pytest.raises(SystemExit) as exit_:
        run.fit(module, tensors(6))
    assert exit_.value.code == code
    saved = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert torch.equal(saved["state_dict"]["encoder.weight"], module.encoder.weight)
    logger.save()
    rows = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3  # the header, and every step, the last among them
    assert [signal.getsignal(each) for each in STOP] == handlers

    module.number = None
    again = trainer(tmp_path / "again", stop)  # with the same callback
    again.fit(module, tensors(6))
    assert again.global_step == 6


class SignalledInValidation(FakeSAE):
    """Is sent a signal by the validation between the two batches of its first step."""

    def validation_step(self, batch):
        super().validation_step(batch)
        if self.trainer.global_step == 0:
            signal.raise_signal(signal.SIGTERM)


def test_a_step_under_way_is_made_after_a_validation(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, StopOnSignal(), save, enable_checkpointing=True, **settings)
    with pytest.raises(SystemExit):
        run.fit(SignalledInValidation(), tensors(6), tensors(3))
    saved = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert saved["state_dict"]["tokens_seen"] == 2 * TOKENS


def test_only_a_main_thread_sets_handlers():
    found = []
    before = [signal.getsignal(each) for each in STOP]
    thread = threading.Thread(target=lambda: found.append(set_handler(STOP, print)))
    thread.start()
    thread.join()
    assert found == [{}]
    assert [signal.getsignal(each) for each in STOP] == before
