"""What callbacks share that run the language model on held-out text."""

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sae.callbacks.find_sae import find_saes
from lightning_sae.checks import require_positive
from lightning_sae.parallel import Ranks, ranks_of
from lightning_sae.part import part_of
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.sae import Encoded

T = TypeVar("T")

_ROWS = ("input_ids", "kept", "states", "attention_mask")
"""What a batch has of each context."""


class HeldOutCallback(Callback, ABC):
    """Measures on the first held-out contexts of every validation and test, and logs at its end.

    It needs a datamodule with the language model as `residual_stream`, whose batches are mappings
    with `activations`, `input_ids` and `kept`, as `ActivationDataModule` has; with other data it
    does nothing, and says so. An `attention_mask` there tells padding (0) from tokens (1). Which
    contexts these are does not depend on the number of devices where a batch says with `first`
    which of all contexts is the first of its own. The SAE may be a part of the module that is
    trained; of several that are trained together, each is measured at its site.

    Args:
        tokens: Tokens to measure on, over all devices, counted as the data module counts
            `validation_tokens`. Contexts are measured whole, until there are as many.

    Attributes:
        needs: Names of what the SAE must have.

    Raises:
        ValueError: If `tokens` is not positive.
    """

    needs: ClassVar[tuple[str, ...]]

    def __init__(self, tokens: int) -> None:
        require_positive(tokens=tokens)
        self.tokens = tokens
        self._each: list[tuple[Any, HeldOutCallback]] = []  # SAEs, and what measures each
        self._seen = 0  # contexts, by this rank
        self._memory: dict[str, Any] = {}
        self._told = False  # that nothing is measured
        self._looked = False  # for the SAE, in this run

    @abstractmethod
    def start(self, ranks: Ranks) -> None:
        """Forget what was measured.

        Args:
            ranks: The processes that measure together from now on.
        """

    @abstractmethod
    def measure(self, sae: Any, residual_stream: ResidualStream, batch: Mapping[str, Any]) -> None:
        """Measure on a batch. Ranks may measure different numbers of them, or none.

        Args:
            sae: What has all that it `needs`.
            residual_stream: The language model.
            batch: As the data module made it; and under `encoded` what the module's step has made
                of it, if it returned an `Encoded` under this name.
        """

    @abstractmethod
    def log_results(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log what was measured, under `stage`: called on all ranks, or none. It may be `val/x`."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start afresh."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start afresh."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on a batch, unless this is only the check before training."""
        if not trainer.sanity_checking:
            self._measure(trainer, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on a batch."""
        self._measure(trainer, outputs, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._log(trainer, pl_module, "test")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember nothing of another run, whose language model may be another."""
        self._memory, self._told, self._looked = {}, False, False

    def remembered(
        self,
        compute: Callable[..., T],
        residual_stream: ResidualStream,
        batch: Mapping[str, Tensor],
        *decisive: Tensor,
    ) -> T:
        """Return `compute()`, or what it returned in this run for the same contexts and tensors.

        A language model that is being trained is not remembered.

        Args:
            compute: Depends on nothing but the language model, the contexts and these tensors.
            residual_stream: The language model.
            batch: Whose contexts they are.
            decisive: The tensors, of any shapes.
        """
        model = getattr(residual_stream, "model", None)
        if model is None or any(weight.requires_grad for weight in model.parameters()):
            return compute()
        digest = hashlib.sha256()
        contexts = [batch[name] for name in ("input_ids", "attention_mask") if name in batch]
        for tensor in (*contexts, *decisive):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = 0
        if not self._looked:  # not in `setup`: a module may make its parts in `configure_model`
            self._looked = True
            saes, self._each = find_saes(pl_module, *self.needs, of=self), []
            alone = len(saes) == 1
            self._each = [(sae, self if alone else copy.deepcopy(self)) for sae in saes]
        for _, own in self._each:
            own.start(ranks_of(trainer))

    def _measure(self, trainer: pl.Trainer, outputs: Any, batch: Any) -> None:
        if not self._each:
            return
        residual_stream = getattr(getattr(trainer, "datamodule", None), "residual_stream", None)
        of_text = isinstance(batch, Mapping) and {"input_ids", "kept"} <= batch.keys()
        if not of_text or residual_stream is None:
            if not self._told:
                self._told = True
                rank_zero_info(
                    f"{type(self).__name__} measures nothing: the data have no language model"
                )
            return
        if not getattr(residual_stream, "is_causal_language_model", True):
            rank_zero_warn(
                f"{type(self).__name__} measures nothing: {type(residual_stream.model).__name__} "
                "does not predict tokens from those before them alone, so it has no loss to measure"
            )
            return
        contexts, length = batch["input_ids"].shape
        first = batch.get("first", self._seen * ranks_of(trainer).size)
        self._seen += contexts
        missing = math.ceil(self.tokens / length) - first
        if missing > 0:
            for sae, own in self._each:
                part = part_of(sae)
                made, held_out = part.of_outputs(outputs), part.of_batch(batch)
                encoded = made.get("encoded") if isinstance(made, Mapping) else None
                if isinstance(encoded, Encoded):
                    held_out["encoded"] = encoded
                own.measure(sae, part.of_streams(residual_stream), _first(missing, held_out))

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Data that is not usable is not usable on any rank, so all ranks log, or none.
        for sae, own in self._each if self._seen > 0 else ():
            own.log_results(trainer, pl_module, part_of(sae).stage(stage))


def known_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a batch says of its contexts that `ResidualStream.replace` takes, by name."""
    return {name: batch[name] for name in ("attention_mask", "states") if name in batch}


def _first(contexts: int, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with no more than its first contexts."""
    if contexts >= len(batch["kept"]):
        return batch
    cut = {name: batch[name][:contexts] for name in _ROWS if name in batch}
    tokens = int(cut["kept"].sum())
    if "activations" in batch:
        cut["activations"] = batch["activations"][:tokens]
    if "encoded" in batch:
        codes, reconstruction = batch["encoded"]
        cut["encoded"] = Encoded(codes.of_first(tokens), reconstruction[:tokens])
    return {**batch, **cut}
