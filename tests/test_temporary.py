"""What is left of a write that was killed is found by the next one, and nothing else is."""

import os
import subprocess
import sys
import time
from pathlib import Path

from lightning_sae.temporary import HOST, left_behind, temporary_of


def of_a_killed_process(target: Path) -> Path:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = temporary_of(target)
    return running.with_name(running.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))


def test_what_is_left_behind_of_others(tmp_path: Path):
    target = tmp_path / "a_b.ckpt"
    ours = temporary_of(target)  # of a process that runs
    killed = of_a_killed_process(target)
    elsewhere, long_ago, another, earlier = (
        tmp_path / name
        for name in ("a-b.ckpt.node7-1-0.tmp", "a-b.ckpt.node7-2-0.tmp", "c.ckpt.x.tmp", "a_b.ckpt")
    )
    for each in (ours, killed, elsewhere, long_ago, another, earlier):
        each.touch()
    os.utime(long_ago, (time.time() - 100_000,) * 2)
    assert set(left_behind(target)) == {killed, long_ago}
    assert f".{HOST}-{os.getpid()}-" in ours.name


def test_what_is_left_behind_is_not_resumed_from(tmp_path: Path):
    """Lightning takes every file with `hpc_ckpt_` in its name, and the largest of all numbers."""
    assert "hpc_ckpt_" not in temporary_of(tmp_path / "hpc_ckpt_1.ckpt").name
