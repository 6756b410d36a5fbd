"""Lightning's averages of weights, in modules whose buffers are counts and thresholds."""

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging

__all__ = ["average_weights_only"]


def average_weights_only(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Have `WeightAveraging` average a module's parameters, and leave its buffers as they are.

    By default it averages buffers too, as is right for those of batch normalisation: of counts it
    would make other counts, and fails at what is true or false. Its average gets the buffers of the
    module itself instead.

    Args:
        trainer: Whose callbacks.
        module: What it trains.
    """
    callbacks = cast(Any, trainer).callbacks  # type checkers do not find it
    for callback in callbacks:
        if not isinstance(callback, WeightAveraging):
            continue
        # Private: in public there is only `use_buffers=False`, for every user to know of, by which
        # an average that is made every tenth step, say, has the counts of that step.
        average: Any = callback._average_model
        average.use_buffers = False
        for name, buffer in module.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(average.module.get_submodule(owner), attribute, buffer)
