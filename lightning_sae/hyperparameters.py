"""Arguments of a module, as its checkpoints note them: by which it can be made again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.core.mixins import HyperparametersMixin

__all__ = ["PlainHyperparameters", "plain"]


class PlainHyperparameters(HyperparametersMixin):
    """Notes arguments in types that a checkpoint may hold.

    Attributes:
        not_noted: Names of arguments that are none of these: functions, say.
    """

    not_noted: ClassVar[tuple[str, ...]] = ()

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Note the arguments of the constructor as Lightning does, and its arguments are the same.

        A subclass that fixes an argument of its base names it under `ignore`, after it has called
        the base: else it would be made again with that argument given twice.
        """
        if frame is None:  # Lightning would look at the caller of its own method, which is this one
            here = inspect.currentframe()
            frame = here and here.f_back
        ignore = [ignore] if isinstance(ignore, str) else list(ignore or ())
        ignore += self.not_noted
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        for name, value in self.hparams.items():
            self.hparams[name] = plain(value)


def plain(value: Any) -> Any:
    """Return a number of NumPy or a path as what Python and command lines have for it.

    Checkpoints are read with `weights_only=True`, which refuses both.
    """
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value
