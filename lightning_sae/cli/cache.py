"""The command `lightning_sae cache`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_sae.callbacks.held_folder import hold
from lightning_sae.checks import UsageError
from lightning_sae.data import FrozenModelDataModule

__all__ = ["fill_cache"]


def fill_cache(data: Any, trainer: pl.Trainer) -> None:
    """Keep what `fit` and `test` would read in --data.cache_dir, and train nothing.

    It takes the same configurations as fit. How many it keeps follows from trainer.max_steps and
    data.batch_size; data of a known length are kept once, however many steps there are. How much
    space they take (data.cache_dtype: float16 halves it) is told first, and refused if that is more
    than data.cache_limit_gb. What is interrupted goes on where it was when it is started again.

    Args:
        data: The data module of the configuration.
        trainer: That of the run to come.

    Raises:
        UsageError: If nothing can be kept of these data, there is no room, or another run fills the
            same folder.
    """
    if not isinstance(data, FrozenModelDataModule):
        raise UsageError(f"data={type(data).__name__}: no model computes these, they lie in files")
    if data.cache_dir is None:
        raise UsageError("data.cache_dir=None: name a folder to keep activations in")
    if trainer.world_size > 1:
        raise UsageError(f"trainer.devices={trainer.world_size}: a cache is filled by one device")
    data.trainer = trainer
    steps = trainer.max_steps
    batches = None if steps < 0 else steps * trainer.accumulate_grad_batches
    needs = data.cache_needs(batches)
    if needs is not None:
        print(needs)
    folder = data.model.cache_folder(data.cache_dir, data.cache_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder, "data.cache_dir"):
        data.fill_cache(batches)
    print(
        f"Train with --data.cache_dir {data.cache_dir}, or, here or elsewhere, without the model: "
        f"--config data/stored.yaml --data.activations {folder}"
    )
