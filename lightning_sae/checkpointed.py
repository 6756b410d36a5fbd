"""An autoencoder as a LightningModule that is saved, loaded, and trained on from checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import lightning.pytorch as pl
from torch import Tensor

from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH, upgrade
from lightning_sae.checkpoint_io import in_present_format
from lightning_sae.checks import UsageError
from lightning_sae.core import Autoencoder
from lightning_sae.core.loading import refuse_unfit
from lightning_sae.hyperparameters import PlainHyperparameters
from lightning_sae.optim.logged_steps import write_curves
from lightning_sae.optim.resumption import Resumption

__all__ = ["CheckpointedAutoencoder"]


class CheckpointedAutoencoder(Autoencoder, PlainHyperparameters, pl.LightningModule):
    """The hooks by which Lightning writes and reads checkpoints.

    Attributes:
        code_settings: Names of the arguments on which the code of a token depends, beside what is
            learned. A checkpoint holds them, and one that was trained with others is refused.
    """

    code_settings: ClassVar[tuple[str, ...]] = (
        "k",
        "importance",
        "normalize_inputs",
        "rank_discount",
    )

    def __init__(self, d_model: int, n_features: int, **options: Any) -> None:
        super().__init__(d_model, n_features, **options)
        self._resumption = Resumption()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a trained SAE as Lightning does, running nothing that the file or URL may hold.

        In Lightning 2.6.6 a checkpoint can name functions to call in place of an optimizer, also
        one loaded with `weights_only=True`; `LightningModule.load_from_checkpoint` calls them.

        Raises:
            UsageError: If it is damaged, has arguments that this class has not, or is given another
                value of one of the `code_settings` than it was trained with.
        """
        safe = {"weights_only": True, "_instantiator": None}
        path = in_present_format(checkpoint_path)
        try:
            return super().load_from_checkpoint(path, *args, **(kwargs | safe))
        except TypeError as error:
            raise UsageError(f"{checkpoint_path} is not of a {cls.__name__}: {error}") from error

    def on_fit_start(self) -> None:
        """Have the optimizers take no state from a checkpoint that they could not have made."""
        if self._trainer is not None:
            names: dict[Tensor, str] = {each: name for name, each in self.named_parameters()}
            self._resumption.watch(self._trainer, names)

    def on_train_start(self) -> None:
        """Say which settings of a resumed run are others than those of its checkpoint."""
        self._resumption.tell()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write curves up to here; note what tells checkpoints apart that do not fit."""
        if self._trainer is not None:
            write_curves(self._trainer)
        checkpoint["architecture"] = type(self).__name__
        # Lightning overwrites hyper_parameters with the arguments of `load_from_checkpoint`.
        checkpoint[TRAINED_WITH] = self._code_settings()
        checkpoint[KEY] = FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or shape; bring an older one up to date.

        One of a class that this one extends is welcome: the extension may be a metric.

        Raises:
            UsageError: If it is one, and the message names both; or if it lacks what a run needs.
        """
        upgrade(checkpoint)
        # A ModelParallelStrategy has loaded the weights by now, and taken them out.
        state = checkpoint.get("state_dict", self.state_dict())
        weight = state.get("encoder.weight")  # of a transcoder the decoder's has another width
        if weight is None or weight.ndim != 2 or "decoder.weight" not in state:
            raise UsageError("the checkpoint holds no SAE: it has no matrix decoder.weight")
        features, width = weight.shape
        name = checkpoint.get("architecture", "an unnamed architecture")
        kinds = {kind.__name__ for kind in type(self).__mro__}
        if name not in kinds or (width, features) != (self.d_model, self.n_features):
            found = f"{name}(d_model={width}, n_features={features})"
            asked = f"{type(self).__name__}(d_model={self.d_model}, n_features={self.n_features})"
            raise UsageError(f"the checkpoint holds {found}, the configuration asks for {asked}")
        trained_with = checkpoint.get(TRAINED_WITH, checkpoint.get("hyper_parameters", {}))
        for name, asked in self._code_settings().items():
            if name in trained_with and trained_with[name] != asked:
                raise UsageError(
                    f"{name}={asked!r}: the SAE in the checkpoint was trained with "
                    f"{name}={trained_with[name]!r}"
                )
        refuse_unfit(self, checkpoint.get("state_dict", {}), "")
        if self._trainer is not None:
            self._resumption.read(self._trainer, checkpoint)

    def _code_settings(self) -> dict[str, Any]:
        return {name: self.hparams[name] for name in self.code_settings if name in self.hparams}
