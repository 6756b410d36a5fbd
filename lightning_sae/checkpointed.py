"""An autoencoder as a LightningModule that is saved, loaded, and trained on from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from lightning_sae.checkpoint_format import FORMAT, KEY, TRAINED_WITH, require_one
from lightning_sae.checkpoint_io import open_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.core import Autoencoder
from lightning_sae.core.loading import refuse_unfit
from lightning_sae.optim.resumable import SAEModule

__all__ = ["CheckpointedAutoencoder"]


class CheckpointedAutoencoder(Autoencoder, SAEModule):
    """What checkpoints note of it, and which of them it refuses.

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

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a trained SAE, as `SAEModule` does; one of several is in a folder of its own."""
        if isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
            require_one(open_checkpoint(Path(checkpoint_path).expanduser()), checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def notes(self) -> dict[str, Any]:
        """Return what tells checkpoints apart that do not fit."""
        return {
            "architecture": type(self).__name__,
            # Lightning overwrites hyper_parameters with the arguments of `load_from_checkpoint`.
            TRAINED_WITH: self._code_settings(),
            KEY: FORMAT,
        }

    def take_notes(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or shape.

        One of a class that this one extends is welcome: the extension may be a metric.

        Raises:
            UsageError: If it is one, and the message names both.
        """
        require_one(checkpoint, "the checkpoint")
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

    def _code_settings(self) -> dict[str, Any]:
        return {name: self.hparams[name] for name in self.code_settings if name in self.hparams}
