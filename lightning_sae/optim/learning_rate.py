"""A learning rate that was found in place of the one that the optimizer was made with."""

from typing import Any

from lightning_sae.optim.factories import MakeSchedule, optimizer_and_schedule
from lightning_sae.optim.resumption import go_on

__all__ = ["train_at"]


def train_at(rate: float, trainer: Any, make_schedule: MakeSchedule | None) -> None:
    """Have the schedules of a run begin at another rate: each made anew, and stepped to its place.

    Lightning's finders set the rate of the optimizer, and a schedule sets it back with its first
    step, for it notes the rate when it is made.

    Args:
        rate: The learning rate.
        trainer: Lightning's, with the optimizers and schedules of a run, or none yet.
        make_schedule: As for `optimizer_and_schedule`, which made them.
    """
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rate
        steps = trainer.estimated_stepping_batches
        made: Any = optimizer_and_schedule(optimizer, make_schedule, steps)
        config.scheduler = made["lr_scheduler"]["scheduler"]
        place = {"last_epoch": trainer.global_step}
        go_on(config.scheduler, place, most=trainer.global_step)
