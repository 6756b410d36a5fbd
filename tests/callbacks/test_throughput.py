import csv

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_sae.callbacks import TokensPerSecond, throughput
from tests.callbacks.fakes import TOKENS, FakeSAE, tensors, trainer


@pytest.fixture
def clock(monkeypatch):
    """Time passes a second at a time: whenever a batch of any kind begins."""

    class Clock:
        seconds = 0.0

        def perf_counter(self):
            return self.seconds

    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Timed(FakeSAE):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_start(self, batch, batch_idx):
        self.clock.seconds += 0.5

    def on_validation_batch_start(self, batch, batch_idx):
        self.clock.seconds += 100


def logged(folder):
    with (folder / "version_0" / "metrics.csv").open() as file:
        return {int(r["step"]): float(r["train/tokens_per_second"]) for r in csv.DictReader(file)}


@pytest.mark.parametrize("validate", [False, True])
def test_rate_is_of_the_window_and_without_validation(tmp_path, clock, validate):
    run = trainer(
        tmp_path,
        TokensPerSecond(),
        logger=CSVLogger(tmp_path, name=""),
        log_every_n_steps=4,
        val_check_interval=2,
        limit_val_batches=1.0 if validate else 0,
    )
    run.fit(Timed(clock), tensors(12), tensors(1))
    assert logged(tmp_path) == {3: 2 * TOKENS, 7: 2 * TOKENS, 11: 2 * TOKENS}


def test_accumulated_batches_count_and_log_once(tmp_path, clock, monkeypatch):
    calls = []
    monkeypatch.setattr(Timed, "log", lambda self, *args, **_: calls.append(args))
    run = trainer(tmp_path, TokensPerSecond(), log_every_n_steps=2, accumulate_grad_batches=3)
    run.fit(Timed(clock), tensors(12), tensors(1))
    assert calls == [("train/tokens_per_second", 2 * TOKENS)] * 2


def test_real_clock(tmp_path):
    run = trainer(tmp_path, TokensPerSecond(), log_every_n_steps=2)
    run.fit(FakeSAE(), tensors(6), tensors(1))
    assert 0 < run.callback_metrics["train/tokens_per_second"] < 1e7


def test_a_module_that_counts_no_tokens_is_told_so(tmp_path):
    module = FakeSAE()
    del module.tokens_seen
    module.training_step = lambda batch: module.encoder(batch).square().mean()
    run = trainer(tmp_path, TokensPerSecond(), log_every_n_steps=1)
    told = "^TokensPerSecond does nothing: neither FakeSAE nor a part of it has tokens_seen$"
    with pytest.warns(UserWarning, match=told):
        run.fit(module, tensors(), tensors(1))
    assert run.callback_metrics == {}


def test_epochs_do_not_matter(tmp_path, clock):
    logger = CSVLogger(tmp_path, name="")
    run = trainer(tmp_path, TokensPerSecond(), logger=logger, log_every_n_steps=4, max_epochs=2)
    run.fit(Timed(clock), tensors(6), tensors(1))
    assert logged(tmp_path) == {3: 2 * TOKENS, 7: 2 * TOKENS, 11: 2 * TOKENS}
