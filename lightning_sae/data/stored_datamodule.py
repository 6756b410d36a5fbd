"""The data module for activations that already lie in files."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_sae.checks import UsageError, require_at_least, require_positive, require_share
from lightning_sae.data.provenance import fingerprint
from lightning_sae.data.stored_vectors import StoredVectors
from lightning_sae.data.stream_datamodule import StreamDataModule
from lightning_sae.data.vector_files import VectorFile, open_vectors, require_alike

__all__ = ["StoredActivationsDataModule"]


class StoredActivationsDataModule(StreamDataModule):
    """Activations that someone has stored, in the same stream as those computed meanwhile.

    It needs no model, and so measures nothing of one's loss. Files may be

    * safetensors, with a tensor (vectors, d_model) or (contexts, length, d_model), as those that
      `lightning_sae cache` writes, and OpenMOSS;
    * `.npy`, with such an array;
    * parquet, with a column of vectors, or of lists of them;
    * a folder written by `Dataset.save_to_disk`, as SAELens' `CacheActivationsRunner` does.

    They are read where they lie, in float16, bfloat16, float32 or float64, a few at a time. In
    safetensors, `kept` (contexts, length) says at which positions to train and measure, and in
    those of `lightning_sae cache` `held_out` (contexts,) on which contexts not to train.

    Args:
        activations: A folder of files of one format, a file, or a pattern such as `layer3/*.npy`.
        column: Tensor or column that holds the vectors. None: the only one that can.
        held_out: Other files like them, to validate and test on. None: what the files say was held
            out when they were written; if they say nothing of it, a share of them.
        held_out_share: Share of contexts, or of runs of vectors, to hold out at random, where
            nothing else is there to validate on.
        skip_positions: First positions of each context that are neither trained nor measured on: 1
            where contexts begin with a BOS token, at which models park attention.
        run_length: Vectors that are read, mixed and held out together, where they are not stored by
            context. The fewer, the better mixed, and the slower to read.
        batch_size: Tokens, that is vectors, of a training batch, over all devices.
        batches_per_block: Batches whose tokens are shuffled together. Twice as many are in memory:
            the next ones are read while these are trained on.
        validation_tokens: Held-out vectors to validate on, in whole contexts or runs.
        test_tokens: Held-out vectors to test on: those that come after.
        seed: Seed of every choice and shuffle.

    Raises:
        UsageError: If an argument is out of its range. Files that cannot be read are noticed when
            first needed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> np.save(pathlib.Path(folder.name, "a.npy"), np.random.rand(5000, 8).astype("float16"))
        >>> data = StoredActivationsDataModule(folder.name, batch_size=256, batches_per_block=2)
        >>> data.d_model
        8
        >>> next(iter(data.train_dataloader()))["activations"].shape
        torch.Size([256, 8])
        >>> folder.cleanup()
    """

    noun: ClassVar[str] = "runs of vectors"
    input_key: ClassVar[str] = "run_numbers"
    place: ClassVar[tuple[str, ...]] = (
        *StreamDataModule.place,
        *("activations", "column", "held_out", "held_out_share", "skip_positions", "run_length"),
    )

    def __init__(
        self,
        activations: str,
        *,
        column: str | None = None,
        held_out: str | None = None,
        held_out_share: float = 0.05,
        skip_positions: int = 0,
        run_length: int = 128,
        batch_size: int = 4096,
        batches_per_block: int = 32,
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        seed: int = 0,
    ) -> None:
        require_share(held_out_share=held_out_share)
        require_at_least(0, skip_positions=skip_positions)
        require_positive(run_length=run_length)
        super().__init__(
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            seed=seed,
        )
        self.save_hyperparameters()
        self.activations = str(activations)  # a `Path` will do
        self.source = f"activations={self.activations!r}"
        self.column = column
        self.held_out = None if held_out is None else str(held_out)
        self.held_out_share = held_out_share
        self.skip_positions = skip_positions
        self.run_length = run_length

    @property
    def d_model(self) -> int:
        """Width of the vectors.

        Raises:
            UsageError: If there are none, or files cannot be read or are not alike.
        """
        return self._vectors.d_model

    @property
    def description(self) -> dict[str, Any]:
        """What is stored: how many vectors, of which width and dtype, and their fingerprint.

        Where the files say what model and layer they are of, that too: a checkpoint of others is
        refused.
        """
        vectors = self._vectors
        return {
            **vectors.files[0].made_of,
            "d_model": vectors.d_model,
            "vectors": vectors.vectors,
            "stored_dtype": vectors.dtype,
            "fingerprint": self._fingerprint,
        }

    @property
    def positions_per_input(self) -> int:
        """Vectors of a context, or of a run."""
        return self._vectors.length

    @property
    def tokens_per_input(self) -> int:
        """The same without positions that are skipped."""
        return self.positions_per_input - self.skip_positions

    @property
    def inputs_at_once(self) -> int:
        """Contexts or runs that are read at once: some thousand vectors."""
        return max(1, 4096 // self.positions_per_input)

    def train_inputs(self) -> Tensor:
        """Return the numbers of the contexts or runs to train on."""
        return self._numbers[0]

    def held_out_inputs(self) -> Tensor:
        """Return the numbers of those that are held out, in the order to measure on them."""
        return self._numbers[1]

    def kept(self, inputs: Tensor) -> Tensor:
        """Return which positions count: those that the files say, but for those to skip."""
        return self._vectors.kept(inputs.tolist())

    def read(self, inputs: Tensor) -> Tensor:
        """Return the vectors of these numbers, (inputs, positions_per_input, d_model)."""
        return self._vectors.read(inputs.tolist()).to(self._device)

    @cached_property
    def _fingerprint(self) -> str | None:
        return fingerprint(self._only(self._vectors.distinct().tolist()))

    @cached_property
    def _inputs_fingerprint(self) -> str | None:
        return fingerprint(self._only(self._numbers[0].tolist()))

    def _only(self, numbers: list[int]) -> Subset[Tensor]:
        return Subset(cast(Any, self._vectors), numbers)

    @cached_property
    def _vectors(self) -> StoredVectors:
        """All inputs: first those that `activations` names."""
        files = self._files
        return StoredVectors([*files[0], *files[1]], self.run_length, self.skip_positions)

    @cached_property
    def _files(self) -> tuple[list[VectorFile], list[VectorFile]]:
        """The files to train on, and others to hold out."""
        files = open_vectors(self.activations, self.column, self.source)
        if self.held_out is None:
            return files, []
        called = f"held_out={self.held_out!r}"
        others = open_vectors(self.held_out, self.column, called)
        require_alike([*files, *others])
        used = {path.resolve() for file in files for path in file.paths}
        for path in (path for file in others for path in file.paths):
            if path.resolve() in used:
                raise UsageError(f"{called}: '{path}' is among the activations to train on")
        return files, others

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """The numbers of the inputs to train on, and of those that are held out."""
        distinct = self._vectors.distinct()
        total = len(distinct)
        apart = self._vectors.held_out()[distinct]
        files, others = self._files
        if others or apart.any():
            train, rest = distinct[~apart], distinct[apart]
            if others:
                first = len(StoredVectors(files, self.run_length, self.skip_positions))
                train, rest = train[train < first], distinct[distinct >= first]
            held_out = np.random.default_rng((self.seed, 2)).permutation(rest)
            return torch.from_numpy(train), torch.from_numpy(held_out)
        count = max(1, round(total * self.held_out_share)) if self.held_out_share else 0
        if count >= total:
            raise UsageError(
                f"held_out_share={self.held_out_share} leaves nothing to train on: {self.source} "
                f"has {total} {self.noun}, of {self.positions_per_input} each"
            )
        order = np.random.default_rng((self.seed, 2)).choice(total, count, replace=False)
        rest = np.delete(distinct, order)
        return torch.from_numpy(rest), torch.from_numpy(distinct[order])
