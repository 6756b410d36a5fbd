"""What `lightning_sae predict` leaves on disk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_sae.callbacks.find_sae import trained_together
from lightning_sae.checks import UsageError
from lightning_sae.matches import Matches
from lightning_sae.parallel import ranks_of
from lightning_sae.part import part_of
from lightning_sae.tensor_files import save_tensors


class WriteMatches(Callback):  # `BasePredictionWriter` warns of every loader without a sampler
    """Writes the matches of each predicted batch to `matches/rank0-batch00000.safetensors`.

    A file holds `token`, `feature` (int64) and `value`, one entry a match, and the text
    `[tokens, features]` under `shape` in its metadata. If the batch is a mapping with them, also
    `kept` (uint8, 1 or 0) and `input_ids`, both (contexts, length), `image_numbers`, (images,), or
    `run_numbers`, (runs,):
    row i of the matches is then the i-th kept position. A file has its name only
    once it is complete. Of several SAEs that are trained together, each has a folder in it.

    Args:
        output_dir: Folder for the files; made if need be. It must not hold such files yet, lest the
            matches of two runs get mixed. None: `matches` in the folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._folder = Path()  # until a run begins

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out where the files go.

        Raises:
            ValueError: If there are those of an earlier run.
        """
        of_run = Path(str(trainer.log_dir), "matches")  # on all ranks, for they agree on it
        self._folder = self.output_dir or of_run
        ours = f"{_stem(trainer)}*.safetensors"
        folders = [self._folder / part_of(each).name for each in trained_together(pl_module)]
        there = any(True for folder in folders for _ in folder.glob(ours))
        if ranks_of(trainer).is_first_with_its_tokens and there:
            raise UsageError(
                f"output_dir={self._folder} holds matches already: remove them or name another"
            )

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the matches of one batch."""
        if not ranks_of(trainer).is_first_with_its_tokens:
            return
        file = f"{_stem(trainer)}{batch_idx:05d}.safetensors"
        for name, matches in (outputs if isinstance(outputs, dict) else {"": outputs}).items():
            if not isinstance(matches, Matches):
                who, found = type(pl_module).__name__, type(matches).__name__
                raise UsageError(
                    f"WriteMatches writes the Matches that predict_step returns, as `sae.match(x)` "
                    f"gives them: that of {who} returns {found}"
                )
            self._write(matches, batch, self._folder / name / file)

    def _write(self, matches: Matches, batch: Any, path: Path) -> None:
        tensors = {"token": matches.token, "feature": matches.feature, "value": matches.value}
        if isinstance(batch, Mapping):
            what_was_read = ("input_ids", "image_numbers", "run_numbers", "kept")
            tensors |= {name: batch[name] for name in what_was_read if name in batch}
        if "kept" in tensors:
            tensors["kept"] = tensors["kept"].to(torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to write
        save_tensors(tensors, path, shape=json.dumps(matches.shape))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the matches are."""
        rank_zero_info(f"The matches are in {self._folder}")


def _stem(trainer: pl.Trainer) -> str:
    return f"rank{ranks_of(trainer).index}-batch"
