"""What is written of whole runs: medians, ratios round by round, and why one was not made."""

import json
from pathlib import Path

from benchmarks.end_to_end import CONTENDERS, Measured, Run, write
from benchmarks.rounds import Size

SIZE, STEPS = Size(2048, 256, 512, 16), 10


def run(cpu: float) -> Run:
    return Run(5.0, 6.0, cpu, 2 * cpu, 2**30, fvu=0.25, l0=16.0)


def test_ratios_are_of_the_runs_of_one_round(tmp_path: Path):
    runs = {name: [] for name in CONTENDERS}
    runs["ours, TopK"] = [run(1.0), run(2.0), run(4.0)]
    runs["SAELens, TopK"] = [run(3.0), run(8.0)]  # the third round is under way
    measured = Measured(SIZE, STEPS, runs, {"sparsify, TopK": "ModuleNotFoundError: none"})
    write(tmp_path, [measured])
    page = (tmp_path / "end_to_end.md").read_text()
    row = "| SAELens, TopK | 6 | 3,724 | 3.50 (3.00-4.00) | 11 | 3.50 (3.00-4.00) | 5 | 1,024 |"
    assert f"{row} 0.250 | 16.0 |" in page
    assert "sparsify, TopK was not run: ModuleNotFoundError: none" in page
    assert "SAELens, BatchTopK" not in page
    raw = json.loads((tmp_path / "end_to_end.json").read_text())
    assert raw["measured"][0]["runs"]["ours, TopK"][2]["training_cpu"] == 4.0
