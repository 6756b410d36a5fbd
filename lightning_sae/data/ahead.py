"""Read what comes next while what came before is trained on."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["read_ahead"]

Item = TypeVar("Item")


def read_ahead(
    items: Iterator[Item], read: Callable[[Item, Event], Tensor]
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

    def begin() -> Future[tuple[Item, Tensor]] | None:
        try:
            return pool.submit(reading, next(items))
        except StopIteration:
            return None
        except Exception as error:  # told when its turn comes: it may never come
            failed: Future[tuple[Item, Tensor]] = Future()
            failed.set_exception(error)
            return failed

    first = next(((item, read(item, closing)) for item in items), None)
    if first is None:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        try:
            upcoming = begin()
            yield first
            del first
            while upcoming is not None:
                current = upcoming  # which lets go of the one before
                upcoming = begin()
                yield current.result()
        finally:
            closing.set()
