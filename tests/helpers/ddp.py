"""Processes that train together, started once a session, on which tests run functions."""

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
TIMEOUT = timedelta(minutes=3)


def run_on_two(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` at once on rank 0 and on rank 1 of a gloo process group.

    `run_on` says the rest.
    """
    return run_on(WORLD_SIZE, function, *args)


def run_on(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` at once on every rank of a gloo process group.

    Arguments and results are copied from process to process.

    Args:
        world_size: Number of ranks.
        function: Found by name in the processes, so defined at the top level of a test module.
        *args: Passed to all ranks. For something different on each, index it with the rank.

    Returns:
        What it returned on each rank.

    Raises:
        Exception: The first that any rank raised. The others may wait for it in vain, so the next
            call starts new processes.
        TimeoutError: If it takes longer than `TIMEOUT`: ranks wait for each other in vain.
    """
    ranks = _ranks(world_size)
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
def _ranks(world_size: int) -> list[ProcessPoolExecutor]:
    # One executor a rank: a pool of two could run both calls on the same process.
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = Path(folder.name, "store").as_uri()
    ranks = [
        ProcessPoolExecutor(
            1,
            mp_context=get_context("spawn"),
            initializer=_join,
            initargs=(rank, world_size, store),
        )
        for rank in range(world_size)
    ]
    # Imports take long on a busy machine, and are not what TIMEOUT is for.
    wait([each.submit(dist.barrier) for each in ranks], TIMEOUT.total_seconds())
    return ranks


def _join(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
