"""Arguments of a module, as its checkpoints note them: by which it can be made again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.utilities.parsing import get_init_args

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
        the base: else it would be made again with that argument given twice. Of a module that is
        made in the constructor of another, only its own are noted: Lightning would note the other's
        too, or in their place what its command line was given.
        """
        if frame is None:  # Lightning would look at the caller of its own method, which is this one
            here = inspect.currentframe()
            frame = here and here.f_back
        ignore = [ignore] if isinstance(ignore, str) else list(ignore or ())
        ignore += self.not_noted
        args = args or (self._own_arguments(frame),)
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        for name, value in self.hparams.items():
            self.hparams[name] = plain(value)

    def _own_arguments(self, frame: FrameType | None) -> dict[str, Any]:
        """Return the arguments of this object's constructors, of which a frame is the innermost."""
        found: dict[str, Any] = {}
        while frame is not None and frame.f_code.co_name == "__init__":
            if frame.f_locals.get(frame.f_code.co_varnames[0]) is not self:
                break
            found |= get_init_args(frame)
            frame = frame.f_back
        return found


def plain(value: Any) -> Any:
    """Return a number of NumPy or a path as what Python and command lines have for it.

    Checkpoints are read with `weights_only=True`, which refuses both.
    """
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value
