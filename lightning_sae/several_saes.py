"""An SAE for each site of a model, trained from one pass of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from lightning_sae.checkpoint_format import FORMAT, KEY, PARTS, TRAINED_WITH
from lightning_sae.checks import UsageError
from lightning_sae.data.batches import activations_in
from lightning_sae.matches import Matches
from lightning_sae.optim.averaging import average_weights_only
from lightning_sae.optim.chunked_adam import ChunkedAdam
from lightning_sae.optim.resumable import SAEModule
from lightning_sae.part import parts_of_widths
from lightning_sae.sae import Encoded, SparseAutoencoder
from lightning_sae.uncompiled import uncompiled

__all__ = ["SeveralSAEs"]

MakeSAE = Callable[[int], SparseAutoencoder]


class SeveralSAEs(SAEModule):
    """Trains an SAE for each of several sites, whose activations are beside each other.

    Data modules that read several sites have them so: the model, which is most of the cost, runs
    once. Each SAE is bit for bit what a run of its own with the same seed and data makes of it: it
    starts from the same random numbers, has its own loss, and gradients are clipped, weights
    stepped by and thresholds and counts kept for each by itself. Curves are `train/<site>/l0`,
    `val/<site>/fvu` and so on.

    Each is a part of the module under the name of its site, `layer_2` say, and is saved in a folder
    of that name (`SavePretrained`), as an SAE of which nobody can tell that it had company. A
    checkpoint has them all, to resume and to measure.

    Args:
        sae: Makes an SAE from the width of its activations: `partial(TopKSAE, n_features=512, k=8)`
            say. All are made alike.
        sites: The width of each site by its name, as data modules have it.

    Raises:
        UsageError: If there is only one site, or it makes something else than SAEs.

    Example:
        >>> from functools import partial
        >>> from lightning_sae import TopKSAE
        >>> both = SeveralSAEs(partial(TopKSAE, n_features=64, k=4), {"layer_1": 8, "layer_2": 8})
        >>> both.layer_2.W_dec.shape
        torch.Size([64, 8])
    """

    not_noted: ClassVar[tuple[str, ...]] = ("sae",)

    def __init__(self, sae: MakeSAE, sites: Mapping[str, int]) -> None:
        super().__init__()
        if len(sites) < 2:
            raise UsageError(
                "SeveralSAEs trains an SAE for each of several sites, and the data have one: name "
                "more, data.layer=[1, 2] say, or train model.sae alone"
            )
        begin = torch.get_rng_state()
        for part in parts_of_widths(sites):
            torch.set_rng_state(begin)  # as each would start alone
            made = sae(sites[part.name])
            if hasattr(made, "d_target") or not isinstance(made, SparseAutoencoder):
                raise UsageError(
                    f"sae={type(made).__name__}: SeveralSAEs trains SAEs, which reconstruct what "
                    "they read; train a transcoder by itself"
                )
            made.part = part
            if made.start_from is not None:  # a folder with one for each
                made.start_from = f"{made.start_from}/{part.name}"
            self.add_module(part.name, made)
        self.sites = dict(sites)
        self.save_hyperparameters()
        self.save_hyperparameters({"each": type(self._first).__name__, **self._first.hparams})

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The SAEs by the names of their sites."""
        return {name: cast(SparseAutoencoder, getattr(self, name)) for name in self.sites}

    @property
    def tokens_seen(self) -> Tensor:
        """Tokens trained on, over all ranks, int64, 0-d."""
        return self._first.tokens_seen

    @property
    def _first(self) -> SparseAutoencoder:
        return next(iter(self.saes.values()))

    # Each does what it does alone

    def setup(self, stage: str) -> None:
        """Set each up, of which one may start from a trained SAE."""
        for sae in self.saes.values():
            sae.setup(stage)

    @uncompiled
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses: the gradient of each SAE is that of its own."""
        own = self._own(activations_in(batch))
        losses = [sae.training_step(x, batch_idx) for sae, x in own]
        return torch.stack(losses).sum()

    def on_validation_epoch_start(self) -> None:
        """Measure afresh."""
        for sae in self.saes.values():
            sae.on_validation_epoch_start()

    @uncompiled
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, dict[str, Encoded] | None]:
        """Measure each, and return what its step does under its name."""
        own = self._own(activations_in(batch))
        return {sae.part.name: sae.validation_step(x, batch_idx) for sae, x in own}

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each."""
        for sae in self.saes.values():
            sae.on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each."""
        for sae in self.saes.values():
            sae.on_test_epoch_end()

    @uncompiled
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Matches]:
        """Return the matches of each, by its name."""
        own = self._own(activations_in(batch))
        return {sae.part.name: sae.predict_step(x, batch_idx) for sae, x in own}

    def on_train_end(self) -> None:
        """Have each note what it was trained on, and matches in training."""
        for sae in self.saes.values():
            sae.on_train_end()

    def configure_callbacks(self) -> list[Callback]:
        """Return what one of them brings along."""
        return self._first.configure_callbacks()

    def notes(self) -> dict[str, Any]:
        """Return the notes of each by its name, and what all have in common."""
        notes = {name: sae.notes() for name, sae in self.saes.items()}
        own = {"architecture": type(self).__name__, KEY: FORMAT, PARTS: notes}
        return own | {TRAINED_WITH: notes[self._first.part.name][TRAINED_WITH]}

    def take_notes(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other sites, or of SAEs that a configuration does not ask for."""
        found = checkpoint.get(PARTS)
        if found is None or found.keys() != self.sites.keys():
            held = "one SAE" if found is None else f"SAEs of {', '.join(found)}"
            raise UsageError(
                f"the checkpoint holds {held}, the configuration asks for SAEs of "
                f"{', '.join(self.sites)}"
            )
        state = checkpoint["state_dict"]
        for name, sae in self.saes.items():
            start = f"{name}."
            own = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            sae.take_notes({**found[name], "state_dict": own})

    # What a Trainer has only one of

    def configure_model(self) -> None:
        """Refuse devices that share out features, and a scale of gradients that all would share.

        Raises:
            UsageError: If the Trainer has either.
        """
        if self.device_mesh is not None:
            raise UsageError(
                "trainer.strategy=ModelParallelStrategy shares out the features of one SAE: train "
                "SeveralSAEs with ddp, or on one device"
            )
        if self._trainer is not None and self._trainer.precision == "16-mixed":
            raise UsageError(
                "trainer.precision=16-mixed: steps of all SAEs would be left out for one; train "
                "SeveralSAEs with bf16-mixed, or 32-true"
            )

    def on_fit_start(self) -> None:
        """Watch over what is restored, and have averages of weights leave counts alone."""
        super().on_fit_start()
        average_weights_only(self.trainer, self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return one optimizer with a group of parameters for each, and its schedule."""
        groups = [{"params": [*sae.parameters()], "name": name} for name, sae in self.saes.items()]
        made: Any = self._first.configure_optimizers(groups)
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        for sae in self.saes.values():
            sae.leave_gradients_in_parts(isinstance(optimizer, ChunkedAdam))
        return cast(OptimizerLRScheduler, made)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, as that of one."""
        self._first.lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, *settings: Any, **named: Any
    ) -> None:
        """Clip the gradients of each by their own norm."""
        for group in optimizer.param_groups:
            own = copy.copy(optimizer)
            own.param_groups = [group]
            self._first.configure_gradient_clipping(own, *settings, **named)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then restore the unit norm in each."""
        super().optimizer_step(*args, **kwargs)
        for sae in self.saes.values():
            sae.normalize_decoder()

    def _own(self, x: Tensor) -> list[tuple[SparseAutoencoder, Tensor]]:
        """Return each SAE with its activations.

        Raises:
            UsageError: If there are others, or fewer.
        """
        if x.shape[-1] != sum(self.sites.values()):
            sites = ", ".join(f"{name} {width}" for name, width in self.sites.items())
            raise UsageError(f"activations are {x.shape[-1]} wide, and not of {sites}")
        return [(sae, sae.part.of(x)) for sae in self.saes.values()]
