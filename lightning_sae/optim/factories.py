"""Optimizers and schedules as users name them, and what they say of settings they do not take."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_sae.checks import UsageError

__all__ = ["MakeOptimizer", "MakeSchedule", "in_terms_of", "optimizer_and_schedule"]

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]

_WARM_UP = 0.05  # of the run


def optimizer_and_schedule(
    optimizer: Optimizer, make_schedule: MakeSchedule | None, steps: float
) -> OptimizerLRScheduler:
    """Return what `configure_optimizers` returns, with a schedule that is stepped every batch.

    A stream of activations has no epochs.

    Args:
        optimizer: As it was made.
        make_schedule: Makes the schedule. Default: the learning rate rises for a twentieth of the
            run and then falls linearly to zero; or it stays as it is if the run has no set number
            of steps.
        steps: Optimizer steps of the run; infinite if it has no set number.

    Raises:
        ValueError: If the schedule does not take its settings, or `eps` is too small for the
            parameters' type.
    """
    _require_eps_in_range(optimizer)
    if make_schedule is not None:
        with in_terms_of("lr_scheduler", ValueError, ZeroDivisionError):
            schedule = make_schedule(optimizer)
    elif math.isfinite(steps):
        schedule = LambdaLR(optimizer, partial(_warm_up_and_decay, steps=max(1, steps)))
    else:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _warm_up_and_decay(step: int, steps: float) -> float:
    """Return what the learning rate is multiplied by at a step.

    Not torch's schedules in a row: a run resumed with more steps than before could not leave their
    zero.
    """
    rising, falling = (step + 1) / (_WARM_UP * steps), (1 - step / steps) / (1 - _WARM_UP)
    return max(0.0, min(1.0, rising, falling))


def _require_eps_in_range(optimizer: Optimizer) -> None:
    """Refuse an `eps` that bounds no step, since it is 0 as a number of the parameters' type."""
    for group in optimizer.param_groups:
        eps = group.get("eps")
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if isinstance(eps, float) and eps > 0 and torch.tensor(eps, dtype=dtype) == 0:
                kind, name = type(optimizer).__name__, str(dtype).removeprefix("torch.")
                raise UsageError(
                    f"optimizer: {kind}'s eps={eps} is 0 in {name}, which the weights are in; "
                    "set one of 1e-4, say, or the Trainer's precision to bf16-mixed"
                )


@contextmanager
def in_terms_of(setting: str, *refusals: type[Exception]) -> Iterator[None]:
    """Have what torch says of a value that it does not take name the setting it is a value of.

    Args:
        setting: What the message begins with.
        refusals: The kinds of errors that torch refuses such values with.

    Raises:
        ValueError: In place of an error of these kinds.
    """
    try:
        yield
    except UsageError:
        raise
    except refusals as error:
        raise UsageError(f"{setting}: {error}") from error
