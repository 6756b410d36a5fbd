"""How fast training goes, in the one unit that compares across batch sizes and devices."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sae.callbacks.find_sae import find_sae


class TokensPerSecond(Callback):
    """Logs `train/tokens_per_second`: tokens of all ranks per second since it last logged.

    It logs when the Trainer does, every `log_every_n_steps` steps. Time spent in validation does
    not count. The module, or a part of it, needs the total of tokens as `tokens_seen`, as
    `SparseAutoencoder` has. (Lightning's `ThroughputMonitor` counts samples, by a function of the
    batch that a configuration file cannot name.)
    """

    def __init__(self) -> None:
        self._step = self._tokens = 0
        self._time = 0.0
        self._sae: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._sae = find_sae(pl_module, "tokens_seen", of=self)
        self._start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock."""
        self._start(trainer)

    def on_train_batch_end(
        self,
        trainer: Any,  # has `log_every_n_steps`, but its type does not say so
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, at the steps at which the Trainer does."""
        step = trainer.global_step
        due = trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0
        if not due or step == self._step or self._sae is None:
            return
        tokens, seconds = self._tokens, self._time
        self._start(trainer)
        rate = (self._tokens - tokens) / (self._time - seconds)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True)

    def _start(self, trainer: pl.Trainer) -> None:
        self._step = trainer.global_step
        self._tokens = int(getattr(self._sae, "tokens_seen", 0))  # on a GPU, waits for the step
        self._time = time.perf_counter()
