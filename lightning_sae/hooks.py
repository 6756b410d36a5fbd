"""Hooks on a module that last as long as a block, and mind their own thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Final

from torch import nn

__all__ = ["hooked"]

_HOOKS: Final[dict[tuple[nn.Module, int, bool], list[Callable[..., Any]]]] = {}
"""Ours of each module in each thread, in the order in which they were entered."""


@contextmanager
def hooked(
    module: nn.Module, hook: Callable[..., Any], *, before: bool = False
) -> Iterator[list[None]]:
    """Have a forward hook on a module, in this thread: others may run the same model meanwhile.

    It acts after those of ours that were there before, and ahead of all others: what transformers
    returns as `hidden_states` is what hooks of its own have seen.

    Args:
        module: The module.
        hook: As `register_forward_hook` takes it. It returns what takes the output's place.
        before: Whether it acts before the module runs: it is then as `register_forward_pre_hook`
            takes it, and returns the inputs.

    Yields:
        A list with an entry for each call of the hook.
    """
    thread = get_ident()
    ours = _HOOKS.setdefault((module, thread, before), [])
    calls: list[None] = []

    def counted(*seen: Any) -> Any:
        calls.append(None)
        return hook(*seen)

    def all_of_ours(ran: nn.Module, *seen: Any) -> Any:
        if get_ident() != thread or ours[-1] is not counted:  # each is there; one does for all
            return None
        # A stand-in puts out what the module did, with what the others made of it.
        *inputs, passed = seen
        for each in ours if ran is module else ours[-1:]:
            passed = each(ran, *inputs, passed)
        return passed

    ours.append(counted)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(all_of_ours, prepend=True)
    try:
        yield calls
    finally:
        handle.remove()
        ours.remove(counted)
        if not ours:
            del _HOOKS[module, thread, before]
