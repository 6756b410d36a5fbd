"""Memory that the counts of a large dictionary take while ranks add them up.

Run it with
    python benchmarks/metric_sync.py
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lightning_sae.metrics import DeadFeatures, FeatureDensity
from tests.helpers.ddp import run_on

FEATURES = 2**24


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rise_in(call: Callable[[], object]) -> int:
    """How far the memory of this process rises while it does something, in bytes."""
    before = most = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return most - before


def peaks(rank: int, features: int) -> dict[str, float]:
    """The most that each metric takes at a time, itself included, in multiples of its state."""
    found = {}
    for kind in (FeatureDensity, DeadFeatures):
        metric = kind(features)
        metric.fires += 1
        metric.tokens += 2
        state = metric.fires.nbytes
        found[f"{kind.__name__}.sync"] = 1 + rise_in(metric.sync) / state
        metric.unsync()
        found[f"{kind.__name__}.compute"] = 1 + rise_in(metric.compute) / state
    return found


if __name__ == "__main__":
    for ranks in (2, 4):
        for rank, found in enumerate(run_on(ranks, peaks, FEATURES)):
            for name, times in found.items():
                print(f"{FEATURES} features, rank {rank} of {ranks}: {name} {times:.2f} x state")
