"""All that is measured on a GPU, in one run of at most eight minutes: see `gpu.sh`.

    python -m benchmarks.gpu FOLDER [--tiny]

writes `gpu.md` and `gpu.json` to the folder:

* the time of a training step of ours, in `Trainer.fit` as shipped, and of SAELens and sparsify
  where they are installed, in the same process, in turns, by CUDA events. "float32" has all
  products in full float32, "TF32" in TF32, and "bf16-mixed" is the Trainer's precision of that
  name. SAELens has its autocast to bfloat16, and sparsify its own, which is always on: the fastest
  that they offer without `torch.compile`;
* the encode GEMM alone, in the same turns;
* what a step consists of, kernel by kernel, and for how much of its time the GPU has none;
* whether the tests for GPUs pass, one of which resumes a run bit for bit.

`--tiny` runs all of it on a CPU, to see that it runs: events are then a clock, and operators stand
for kernels. What has been measured is written after every size.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import ours, peers
from benchmarks.activations import draw
from benchmarks.report import PACKAGES, processor, ratio, table, version_of
from benchmarks.rounds import Contender, Outcome, Size
from benchmarks.turns import take_turns

SIZES = [
    Size(tokens, 768, features, 32) for features in (24576, 131072) for tokens in (16384, 4096)
]
TINY = [Size(256, 64, 512, 8)]
PRECISIONS = {"float32": ("highest", "32-true"), "TF32": ("high", "32-true")}
PRECISIONS["bf16-mixed"] = ("high", "bf16-mixed")
"""By name: torch's setting for float32 products, and the Trainer's precision."""
GEMMS = {"float32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}
BF16_GEMM = "encode GEMM, bf16"
PROFILED, WARM = 4, 6  # steps
KERNELS = 25  # rows of a table
TESTS = Path(__file__).parent.parent / "tests" / "test_gpu.py"


def gemm(turns: Any, dtype: torch.dtype) -> None:
    """Compute affinities, and do nothing with them."""
    size = turns.size
    encoder = torch.randn(size.n_features, size.d_model, device=turns.device, dtype=dtype)
    affinities = torch.empty(size.tokens, size.n_features, device=turns.device, dtype=dtype)
    first = None
    for x in turns:
        first = x.to(dtype) if first is None else first
        torch.mm(first, encoder.T, out=affinities)


def contenders(size: Size) -> list[tuple[Contender, str]]:
    """Return who takes turns, with the precision of float32 products meanwhile."""
    found = []
    for name, dtype in GEMMS.items():
        contender = Contender(f"encode GEMM, {name}", size, gemm, {"dtype": dtype})
        found.append((contender, PRECISIONS.get(name, ["high"])[0]))
    for precision, (products, trainer) in PRECISIONS.items():
        for name, architecture in ours.ARCHITECTURES.items():
            options = {"architecture": architecture, "precision": trainer, "progress_bar": False}
            found.append((Contender(f"{name}, {precision}", size, ours.fit, options), products))
    for rule in peers.RULES:
        options = {"rule": rule, "autocast": True}
        found.append((Contender(f"SAELens {rule}", size, peers.saelens, options), "high"))
    options = {"optimizer": "signum"}
    found.append((Contender("sparsify topk, signum", size, peers.sparsify, options), "high"))
    return found


def profile(architecture: str, size: Size, precision: str, x: torch.Tensor) -> dict[str, Any]:
    """Return what the kernels of a step take, in a plain loop, and how long none is at work.

    Args:
        architecture: Name of the class.
        size: Size of the problem.
        precision: One of `PRECISIONS`.
        x: Activations to train on, (tokens, d_model), on the device.
    """
    from torch.profiler import ProfilerActivity

    device = x.device.type
    products, trainer = PRECISIONS[precision]
    torch.set_float32_matmul_precision(products)
    sae = ours.build(architecture, size).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3, eps=6.25e-10, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=trainer == "bf16-mixed"):
            loss, _ = sae.loss(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), ours.CLIP)
        optimizer.step()
        sae.normalize_decoder()

    finish: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(WARM):
        step()
    finish()
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for _ in range(PROFILED):
            step()
        finish()
        wall = time.perf_counter() - begin
    events = [event for event in profiler.events() if not event.is_user_annotation]
    if on_gpu:
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    taken = [e.time_range.elapsed_us() if on_gpu else e.self_cpu_time_total for e in events]
    kernels: dict[str, list[float]] = {}
    for event, microseconds in zip(events, taken, strict=True):
        kernels.setdefault(event.name, []).append(microseconds)
    rows = [[n, len(each) / PROFILED, sum(each) / PROFILED] for n, each in kernels.items()]
    rows.sort(key=lambda row: -row[2])
    step_us = wall / PROFILED * 1e6
    # On one stream kernels do not overlap.
    return {"step_us": step_us, "idle": 1 - sum(taken) / PROFILED / step_us, "kernels": rows}


def run_tests() -> tuple[str, bool]:
    """Run the tests for GPUs; return the end of what they say, and whether they pass."""
    # Not by the options of the project: some are a plugin's, which these tests do not need.
    options = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(TESTS)]
    done = subprocess.run(command, cwd=TESTS.parent.parent, capture_output=True, text=True)  # noqa: S603  # our own tests
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    return "\n".join(lines[-12:]), done.returncode == 0


class Report:
    """What has been measured so far, and its two files."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.steps: dict[Size, Outcome] = {}
        self.profiles: dict[str, dict[str, Any]] = {}
        self.tests = "not run yet"
        self.begin = time.perf_counter()

    def write(self) -> None:
        """Write the page and the JSON."""
        about: dict[str, Any] = {"device": processor(self.device)}
        about |= {name: version_of(name) for name in (*PACKAGES, "triton")}
        about["seconds"] = round(time.perf_counter() - self.begin)
        page = [", ".join(f"{name} {value}" for name, value in about.items())]
        for size, outcome in self.steps.items():
            page += [f"## {size}", step_table(size, outcome)]
            page += [f"{name} was not run: {why}" for name, why in outcome.failures.items()]
        for name, found in self.profiles.items():
            page += [f"## A step of {name}, in a plain loop", profile_table(found)]
            if self.device == "cuda":
                page.append(f"In `Trainer.fit` the idle share is {found['idle_in_fit']:.1%}.")
        page += ["## Tests for GPUs", f"```\n{self.tests}\n```"]
        (self.folder / "gpu.md").write_text("\n\n".join(page) + "\n")
        steps = {str(size): asdict(outcome) for size, outcome in self.steps.items()}
        raw = about | {"steps": steps, "profiles": self.profiles, "tests": self.tests}
        (self.folder / "gpu.json").write_text(json.dumps(raw, indent=1))


def step_table(size: Size, outcome: Outcome) -> str:
    """Return a row for each contender: the time of a step, and as a multiple of two others."""
    rows = []
    gemm_seconds = outcome.seconds(BF16_GEMM)
    topk = {p: outcome.steps.get(f"TopK, {p}") for p in PRECISIONS}
    for name in outcome.steps:
        seconds = outcome.seconds(name)
        same = name.rpartition(", ")[2]
        of_topk = outcome.seconds(f"TopK, {same}") if topk.get(same) else []
        is_gemm = name.startswith("encode GEMM")
        rows.append(
            [
                name,
                f"{median(seconds) * 1e3:.2f}",
                f"{min(seconds) * 1e3:.2f}",
                f"{size.tokens / median(seconds):,.0f}",
                f"{ratio(seconds, gemm_seconds):.2f}",
                f"{ratio(seconds, of_topk):.2f}" if of_topk and not is_gemm else "",
            ]
        )
    header = ["step", "ms", "least", "tokens/s", "/ bf16 GEMM", "/ TopK, same precision"]
    return table(header, rows)


def profile_table(found: dict[str, Any]) -> str:
    """Return what the kernels take, those that take most first."""
    step_us = found["step_us"]
    rows = [
        [f"`{name[:100]}`", f"{calls:.0f}", f"{us:.0f}", f"{us / step_us:.1%}"]
        for name, calls, us in found["kernels"][:KERNELS]
    ]
    rest = found["kernels"][KERNELS:]
    rows.append(
        ["the others", f"{sum(r[1] for r in rest):.0f}", f"{sum(r[2] for r in rest):.0f}", ""]
    )
    rows.append(["none: idle", "", f"{found['idle'] * step_us:.0f}", f"{found['idle']:.1%}"])
    rows.append(["the step", "", f"{step_us:.0f}", ""])
    return table(["kernel", "calls", "us", "of the step"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    device = "cpu" if given.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "there is no GPU here; --tiny runs on a CPU\n")
    report = Report(given.folder, device)
    amount = {"rounds": 2, "steps": 2} if given.tiny else {"rounds": 5, "steps": 5}
    for size in TINY if given.tiny else SIZES:
        batches = [batch.to(device) for batch in draw(size, 2)]
        setting = {"device": device, "logs": given.folder, **amount}
        report.steps[size] = take_turns(contenders(size), batches, **setting)
        report.write()
        if size.n_features == 24576 or given.tiny:
            for name, architecture in ours.ARCHITECTURES.items():
                found = profile(architecture, size, "TF32", batches[0])
                busy = found["step_us"] * (1 - found["idle"])
                taken = report.steps[size].steps.get(f"{name}, TF32")
                step_us = median(step.seconds for step in taken) * 1e6 if taken else float("nan")
                found["idle_in_fit"] = 1 - busy / step_us
                report.profiles[f"{name}, TF32, {size}"] = found
        del batches
        gc.collect()
        report.write()
    report.tests, passed = run_tests()
    report.write()
    failed = {name for outcome in report.steps.values() for name in outcome.failures}
    failed = {name for name in failed if not name.startswith(("SAELens", "sparsify"))}
    if failed or not passed:
        sys.exit(f"{', '.join(sorted(failed)) or 'tests'} failed: see {given.folder}")


if __name__ == "__main__":
    main()
