"""Two processes that train together, started once a session, on which tests run functions."""

import atexit
import functools
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = 2
TIMEOUT = timedelta(seconds=60)


def run_on_two(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` at once on rank 0 and on rank 1 of a gloo process group.

    Arguments and results are copied from process to process.

    Args:
        function: Found by name in the processes, so defined at the top level of a test module.
        *args: Passed to both ranks. For something different on each, index it with the rank.

    Returns:
        What it returned on rank 0 and on rank 1.

    Raises:
        Exception: The first that either rank raised. The other may wait for it in vain, so the next
            call starts new processes.
        TimeoutError: If the ranks wait for each other for a minute.
    """
    ranks = _ranks()
    futures = [each.submit(function, rank, *args) for rank, each in enumerate(ranks)]
    done, waiting = wait(futures, TIMEOUT.total_seconds(), return_when=FIRST_EXCEPTION)
    failures = [future.exception() for future in done if future.exception()]
    if not failures and not waiting:
        return [future.result() for future in futures]
    _ranks.cache_clear()
    for each in ranks:
        each.shutdown(wait=False, cancel_futures=True)
    raise failures[0] if failures else TimeoutError(f"{function} still runs after {TIMEOUT}")


@functools.cache
def _ranks() -> list[ProcessPoolExecutor]:
    # One executor a rank: a pool of two could run both calls on the same process.
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = Path(folder.name, "store").as_uri()
    return [
        ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_join, initargs=(rank, store)
        )
        for rank in range(WORLD_SIZE)
    ]


def _join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT
    )
