"""What a run takes from the checkpoint it goes on from, beside the weights.

Of the optimizer that is its state; its settings, and the schedule, are those that the run is
configured with. Lightning would restore the old settings too, and train by others than it is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_sae.checks import UsageError
from lightning_sae.optim.factories import in_terms_of
from lightning_sae.optim.optimizer_state import is_of_torch, require_state_of

__all__ = ["Resumption", "go_on"]


class Resumption:
    """Watches over what Lightning restores when a run is resumed."""

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None  # until its schedules are gone on with
        self._read_by: Any = None  # the state of the Trainer that it is for
        self._begun = False
        self._before: list[tuple[Optimizer, list[dict[str, Any]]]] = []

    def read(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks what the Trainer restores.

        Args:
            trainer: Lightning's.
            checkpoint: What was read. Its schedules are taken out if a run is resumed.

        Raises:
            UsageError: If something is missing, or a count is negative.
        """
        loop = "_".join((trainer.state.fn.value, "loop"))
        loops = checkpoint.get("loops") or {loop: None}
        if trainer.state.fn != TrainerFn.FITTING:
            if loop not in loops:
                raise UsageError(f"the checkpoint has no loops.{loop}")
            return
        for key in ("optimizer_states", "lr_schedulers"):
            if not isinstance(checkpoint.get(key), list):
                raise UsageError(
                    f"the checkpoint has no {key}: no run can go on from it, perhaps because it "
                    "was saved with save_weights_only"
                )
        _require_counts(loops.get(loop), trainer.fit_loop.state_dict(), f"loops.{loop}")
        for key in ("global_step", "epoch"):
            _require_counts(checkpoint.get(key), 0, key)
        self._begun = checkpoint["global_step"] > 0
        self._checkpoint, self._read_by = dict(checkpoint), trainer.state
        checkpoint["lr_schedulers"] = []
        if trainer.strategy.restore_checkpoint_after_setup:
            self._resume_schedules(trainer)

    def watch(self, trainer: Any, names: Mapping[Tensor, str]) -> None:
        """Have optimizers take from a checkpoint only states that fit, and schedules their place.

        Args:
            trainer: Lightning's, with optimizers and schedules as they are made.
            names: What the parameters are called.

        Raises:
            UsageError: If the checkpoint is of another number of optimizers, or has no place that
                a schedule can go on from.
        """
        self._before = []
        for optimizer in trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(partial(self._only_states, names=names))
        self._resume_schedules(trainer)

    def tell(self) -> None:
        """Say in one line which settings are others than in the checkpoint."""
        changes = [change for each in self._before for change in _changes(*each)]
        if changes:
            rank_zero_info(f"The run goes on as it is configured: {', '.join(changes)}")
        self._before = []

    def _resume_schedules(self, trainer: Any) -> None:
        saved, self._checkpoint = self._checkpoint, None
        if saved is None or trainer.state is not self._read_by:  # of a run that did not begin
            return
        number = len(saved["optimizer_states"])
        if number != len(trainer.optimizers):
            raise UsageError(
                f"the checkpoint has {number} optimizer_states, not {len(trainer.optimizers)}"
            )
        for number, config in enumerate(trainer.lr_scheduler_configs):
            passed = saved["global_step" if config.interval == "step" else "epoch"]
            states = saved["lr_schedulers"]
            state = states[number] if number < len(states) else {}
            if isinstance(state, dict):  # that of a chain has no place of its own
                state = {"last_epoch": passed} | state
            go_on(config.scheduler, state, most=saved["global_step"] + saved["epoch"])

    def _only_states(
        self, optimizer: Optimizer, state_dict: dict[str, Any], names: Mapping[Tensor, str]
    ) -> dict[str, Any]:
        require_state_of(optimizer, state_dict, names, begun=self._begun)
        self._before.append((optimizer, state_dict["param_groups"]))
        if not is_of_torch(optimizer):  # which may keep states among its settings
            return state_dict
        pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        return state_dict | {
            "param_groups": [saved | now | {"params": saved["params"]} for now, saved in pairs]
        }


def go_on(schedule: Any, saved: Any, most: int) -> None:
    """Step a schedule, as it is configured, to the place of a saved one.

    Args:
        schedule: A `LRScheduler`.
        saved: The state of that of the checkpoint, which may be another.
        most: More steps it cannot have made.
    """
    place = saved.get("last_epoch") if isinstance(saved, dict) else saved
    if type(place) is not int or not 0 <= place <= most:
        raise UsageError(f"lr_schedulers: last_epoch={place!r} of the checkpoint is no place")
    name = f"lr_scheduler={type(schedule).__name__}"
    if isinstance(schedule, ReduceLROnPlateau) or getattr(schedule, "last_epoch", 0) > 0:
        # What decided its steps is over, or Lightning has used it to look for a learning rate.
        if saved.keys() != schedule.state_dict().keys():
            raise UsageError(f"{name}: the checkpoint has the state of another one")
        schedule.load_state_dict(saved)
        groups = schedule.optimizer.param_groups
        for group, rate in zip(groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        return
    with warnings.catch_warnings(), in_terms_of(name, ValueError, ZeroDivisionError):
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(place):
            schedule.step()


def _changes(optimizer: Optimizer, saved: list[dict[str, Any]]) -> list[str]:
    """Return the settings of an optimizer that were others in the checkpoint, and both values."""
    found = {
        f"{key}={_plain(now[key])} (in the checkpoint {_plain(before[key])})"
        for now, before in zip(optimizer.param_groups, saved, strict=True)
        for key in now.keys() & before.keys() - {"params"}
        if _plain(now[key]) != _plain(before[key])
    }
    return sorted(found)


def _plain(setting: Any) -> Any:
    if isinstance(setting, Tensor):
        return setting.item()
    return tuple(setting) if isinstance(setting, list) else setting


def _require_counts(found: Any, like: Any, name: str) -> None:
    """Refuse what is not as the loops of a run count: an older version's may lack something."""
    if isinstance(like, dict) and isinstance(found, dict):
        for key in found.keys() & like.keys():
            _require_counts(found[key], like[key], f"{name}.{key}")
    elif type(found) is not type(like) or (isinstance(found, int) and found < 0):
        raise UsageError(f"the checkpoint has {name}={found!r}, and such a count is {like!r} or so")
