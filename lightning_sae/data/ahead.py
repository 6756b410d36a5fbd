"""Read what comes next while what came before is trained on."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["read_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    items: Iterator[Item],
    read: Callable[[Item, Event], Tensor],
    expected: Callable[[Item], bool] = lambda _: True,
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with what is read of it, while a thread reads the next one, and no more.

    The caller reads the first one, which it would wait for anyway: a signal can stop it at once,
    also where a model is loaded for it, and would have to wait for a thread.

    The thread is gone when the iterator is closed, as soon as a reading that was begun has ended. A
    program that ends with an open iterator waits for all of it.

    Args:
        items: Asked for the next one when the one before is due, in the caller's thread.
        read: Called in the thread, for the first item by the caller. It may return anything once
            the event is set.
        expected: Whether anybody will ask for an item, as far as one knows. One that is not
            expected is read by the caller, if it is asked for after all.

    Raises:
        Exception: Whatever `items` and `read` raise, when the item's turn has come.
    """
    closing = Event()
    threads = torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def reading(item: Item) -> tuple[Item, Tensor]:
        # What is read must not depend on who reads it, and a thread begins with its own defaults.
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)
        return item, read(item, closing)

    def begin(item: Item) -> Callable[[], tuple[Item, Tensor]]:
        return pool.submit(reading, item).result if expected(item) else partial(reading, item)

    first = next(((item, read(item, closing)) for item in items), None)
    if first is None:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        try:
            upcoming = _of_the_next(items, begin)
            yield first
            del first
            while upcoming is not None:
                current = upcoming  # which lets go of the one before
                upcoming = _of_the_next(items, begin)
                yield current()
        finally:
            closing.set()


def _of_the_next(
    items: Iterator[Item], begin: Callable[[Item], Callable[[], Result]]
) -> Callable[[], Result] | None:
    """Return what `begin` does of the next item; None if there is none."""
    try:
        return begin(next(items))
    except StopIteration:
        return None
    except Exception as error:  # told when its turn comes: it may never come
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed.result
