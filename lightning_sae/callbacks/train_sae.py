"""An SAE that is trained on a layer of somebody's own model while that model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sae.checks import UsageError
from lightning_sae.optim.factories import MakeOptimizer
from lightning_sae.parallel import ranks_of
from lightning_sae.sae import SparseAutoencoder

__all__ = ["TrainSAE"]


class TrainSAE(Callback):
    """Trains an SAE on what a layer of the module gives out, as the module's own training goes on.

    Each training batch is a batch of the SAE's, all its positions or those that `keep` says; each
    validation measures the SAE on what the layer gives out then. Curves are under `sae/train/` and
    `sae/val/`. The module's training is the same bit for bit: activations are detached, the SAE has
    an optimizer of its own, and random numbers stay as they were.

    The SAE is no part of the module, and not in its state dict. Checkpoints keep it and its
    optimizer among the states of callbacks, so that a resumed run goes on with it.

    It is for one device, or for several that each see all tokens.

    Args:
        sae: The SAE, as wide as the layer's output.
        layer: Name of the layer in the module, as `named_modules` has it. Its output is a tensor
            (..., d_model), or a tuple that begins with one.
        optimizer: Makes the SAE's optimizer from its parameters.
        keep: Chooses activations (tokens, d_model), given the output (..., d_model). Default: all.
        name: What curves begin with.

    Raises:
        UsageError: If a run begins whose module has no such layer, or which has several devices.

    Example:
        >>> from lightning_sae import TopKSAE
        >>> callback = TrainSAE(TopKSAE(d_model=64, n_features=512, k=8), layer="blocks.3")
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        layer: str,
        *,
        optimizer: MakeOptimizer = torch.optim.Adam,
        keep: Callable[[Tensor], Tensor] | None = None,
        name: str = "sae",
    ) -> None:
        self.sae = sae
        self.layer = layer
        self.name = name
        self._keep = keep
        self._make_optimizer = optimizer
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] | None = None  # until there is an optimizer
        self._seen: list[Tensor] = []
        self._hook: RemovableHandle | None = None
        self._measured = False  # in the validation under way

    @property
    def state_key(self) -> str:
        """Tell several of these apart in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what it cannot do."""
        if ranks_of(trainer).size > 1:
            raise UsageError("TrainSAE trains on one device: set devices=1")
        if stage == "fit":
            self._optimizer = None  # that of an earlier run, which checkpoints may have been of

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go to the module's device, and listen to the layer."""
        modules = dict(pl_module.named_modules())
        if self.layer not in modules:
            raise UsageError(
                f"layer={self.layer!r}: {type(pl_module).__name__} has no module of this name"
            )
        self.sae.to(pl_module.device).train()
        self._optimizer = self._make_optimizer(self.sae.parameters())
        if self._restored is not None:
            self._optimizer.load_state_dict(self._restored)
            self._restored = None
        self._hook = modules[self.layer].register_forward_hook(self._listen)

    def _listen(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor):
            raise UsageError(f"layer={self.layer!r} gives out no tensor: {type(x).__name__}")
        x = x.detach() if self._keep is None else self._keep(x.detach())
        self._seen.append(x.reshape(-1, x.shape[-1]).clone())  # it may be changed in place later

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget what the layer gave out before."""
        self._seen = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Train the SAE on what the layer gave out for this batch."""
        if not self._seen or self._optimizer is None:
            rank_zero_warn(f"TrainSAE: layer={self.layer!r} gave out nothing in a training step")
            return
        x, self._seen = torch.cat(self._seen), []
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            loss, stats = self.sae.loss(x)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self.sae.normalize_decoder()
        for key, value in stats.items():
            pl_module.log(f"{self.name}/train/{key}", value)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure afresh."""
        self.sae.on_validation_epoch_start()
        self._measured = False

    def on_validation_batch_start(self, *_: Any) -> None:
        """Forget what the layer gave out before."""
        self._seen = []

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Measure the SAE on what the layer gave out for this batch, unless it is untrained."""
        seen, self._seen = self._seen, []
        if seen and self._hook is not None and not trainer.sanity_checking:
            self.sae.measure(torch.cat(seen))
            self._measured = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        if self._measured:
            for key, value in self.sae.measured().items():
                pl_module.log(f"{self.name}/val/{key}", value.float())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no longer, also after an error."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        """Return the SAE and its optimizer's state."""
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else None
        return {"sae": self.sae.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the SAE of a checkpoint."""
        self.sae.load_state_dict(state_dict["sae"])
        if self._optimizer is not None and state_dict["optimizer"] is not None:
            self._optimizer.load_state_dict(state_dict["optimizer"])
        else:
            self._restored = state_dict["optimizer"]
