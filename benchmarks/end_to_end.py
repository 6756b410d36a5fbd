"""How long it takes to train an SAE on a language model: by ours, and by other libraries.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.end_to_end FOLDER

writes `end_to_end.md` and `.json` to the folder; `--quick` shows in two minutes that everything
runs. A library that is not installed is left out, and the table says so.

The same language model (the packaged one, by its class of Hugging Face), the same contexts, layer,
dictionary, matches a token, tokens and batch size go through SAELens' training runner, sparsify's
Trainer and `lightning_sae fit`; `whole_runs.py` says how each is set. Each run has a process of its
own, one after another in an order that rotates, and ratios are medians over rounds.

A run is divided where the language model first reads a context. What comes before is start-up:
imports, the model, the data set. What comes after, until the SAE is saved, is training, which
tokens per second are of. CPU time is that of all threads of the process. In wall time they overlap
where a library reads ahead, and it has whatever else the machine does in it. Memory is the peak of
what is resident. What an SAE is worth is measured afterwards, on the same held-out tokens for
everyone, by the code with which the library itself runs a saved SAE.
"""

import argparse
import functools
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import whole_runs
from benchmarks.report import PACKAGES, processor, table, version_of
from benchmarks.rounds import Size, memory
from benchmarks.whole_runs import CONTEXT, LAYER, Job

SIZES = [Size(2048, 256, 2048, 16), Size(2048, 256, 8192, 16)]
QUICK = [Size(2048, 256, 512, 16)]
HELD_OUT = 65_536
CONTENDERS: dict[str, Callable[[Job], str]] = {
    "ours, TopK": functools.partial(whole_runs.ours, config="topk"),
    "ours, Mutual Choice": functools.partial(whole_runs.ours, config="mutual_choice"),
    "SAELens, TopK": functools.partial(whole_runs.saelens, rule="topk"),
    "SAELens, BatchTopK": functools.partial(whole_runs.saelens, rule="batchtopk"),
    "sparsify, TopK": whole_runs.sparsify,
}
RATIO_TO = {name: "ours, Mutual Choice" if "Batch" in name else "ours, TopK" for name in CONTENDERS}
"""The run of ours that each is compared with: the one whose rule for the choice is the same."""


@dataclass
class Run:
    """What a run took: seconds of start-up and of training, CPU and wall, and bytes at the peak.

    `fvu` and `l0` are of the result, on held-out tokens.
    """

    startup_cpu: float
    startup_wall: float
    training_cpu: float
    training_wall: float
    peak: int
    fvu: float = float("nan")
    l0: float = float("nan")


@dataclass
class Measured:
    """The runs of one size, by contender, and why others could not be made."""

    size: Size
    steps: int
    runs: dict[str, list[Run]]
    failures: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the report goes")
    parser.add_argument("--sizes", type=Size.parse, nargs="+", metavar="N,D,F,K", default=SIZES)
    # Not a multiple of the 32 batches that `fit` reads at once: Lightning asks for one batch beyond
    # the last step's, and a block would be read for it.
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    given = parser.parse_args(arguments)
    if given.quick:
        given.sizes, given.steps, given.rounds = QUICK, 8, 1
    work = given.folder.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"WANDB_MODE": "disabled", "HF_DATASETS_CACHE": str(work / "datasets")}
    prepare(work, max(size.tokens for size in given.sizes) * given.steps)
    names = list(CONTENDERS)
    every = [Measured(size, given.steps, {name: [] for name in names}) for size in given.sizes]
    for number, measured in itertools.product(range(given.rounds), every):
        first = number * len(names) // given.rounds
        for name in names[first:] + names[:first]:
            if name in measured.failures:
                continue
            folder = work / f"{measured.size}, {name}, round {number}"
            folder.mkdir(parents=True, exist_ok=True)
            result = in_own_process(name, Job(measured.size, measured.steps, work, folder))
            print(f"{measured.size}, {name}: {result}", flush=True)
            if isinstance(result, Run):
                measured.runs[name].append(result)
            else:
                measured.failures[name] = result
            # After each run, so that a benchmark that is cut short leaves what it has measured.
            write(work, every)
    print(f"see {work}", flush=True)


def prepare(work: Path, tokens: int) -> None:
    """Write what all runs share: a text of enough tokens, its contexts, held-out activations."""
    if (work / "held_out.safetensors").exists():
        return
    import datasets
    import torch

    from lightning_sae import ActivationDataModule
    from lightning_sae.quickstart import TEXT
    from lightning_sae.tensor_files import save_tensors

    (work / "text").mkdir(parents=True, exist_ok=True)
    documents = datasets.Dataset.from_parquet(str(TEXT / "train.parquet"))
    per_document = 5_788_956 / len(documents)
    enough = min(len(documents), round(1.3 * tokens / per_document) + 20)
    documents.select(range(enough)).to_parquet(work / "text" / "train.parquet")
    held_out = datasets.Dataset.from_parquet(str(TEXT / "validation.parquet"))
    held_out.to_parquet(work / "text" / "validation.parquet")

    # The contexts on which `fit` trains, which it finds in the cache again.
    data = ActivationDataModule(
        "quickstart",
        LAYER,
        text=str(work / "text"),
        context_length=CONTEXT,
        validation_tokens=HELD_OUT,
    )
    contexts = data.train_inputs().packed
    contexts.shuffle(seed=0).flatten_indices().save_to_disk(work / "contexts")
    data.prepare_data()
    data.setup("validate")
    batches = [batch["activations"] for batch in data.val_dataloader()]
    save_tensors({"activations": torch.cat(batches)}, work / "held_out.safetensors")


def in_own_process(name: str, job: Job) -> Run | str:
    """Train and measure in a fresh process; return why where that cannot be done."""
    context = get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(
        target=train_and_measure, args=(theirs, name, job, time.time()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        answer: Run | str = connection.recv()
    except EOFError:
        answer = ""
    process.join()
    return answer or f"ended with code {process.exitcode}"


def train_and_measure(connection: Connection, name: str, job: Job, started: float) -> None:
    """Send what a run took and is worth, or why it failed; what it prints goes to a file."""
    with (job.folder / "log.txt").open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            run, result = train(name, job, started)
            connection.send(replace(run, **measure(result, job)))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            told = str(error).strip().splitlines() or [""]
            connection.send(f"{type(error).__name__}: {told[0]}")


def train(name: str, job: Job, started: float) -> tuple[Run, str]:
    """Make one run; return what it took, and what names the SAE it left."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import PreTrainedModel

    torch.set_num_threads(1)
    reading: list[tuple[float, float]] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, PreTrainedModel) and not reading:
            reading.append((time.process_time(), time.time()))

    handle = register_module_forward_pre_hook(note)
    result = CONTENDERS[name](job)
    cpu, wall = time.process_time(), time.time()
    handle.remove()
    begun_cpu, begun_wall = reading[0]
    run = Run(begun_cpu, begun_wall - started, cpu - begun_cpu, wall - begun_wall, memory("VmHWM"))
    return run, result


def measure(result: str, job: Job) -> dict[str, float]:
    """Return the FVU and the matches a token of an SAE, on held-out tokens."""
    import torch
    from safetensors.torch import load_file

    from lightning_sae import load
    from lightning_sae.interop import FORMATS
    from lightning_sae.metrics import FractionOfVarianceUnexplained

    library, _, folder = result.rpartition(":")
    encode_and_decode = FORMATS[library].run(Path(folder)) if library else run_ours(load(folder))
    fvu, matches, tokens = FractionOfVarianceUnexplained(job.size.d_model), 0, 0
    with torch.no_grad():
        for x in load_file(job.work / "held_out.safetensors")["activations"].split(2048):
            codes, reconstruction = encode_and_decode(x)
            fvu.update(reconstruction, x)
            matches += int((codes != 0).sum())
            tokens += len(x)
    return {"fvu": float(fvu.compute()), "l0": matches / tokens}


def run_ours(sae: Any) -> Any:
    """Return what gives codes and reconstructions by an SAE of ours."""

    def encode_and_decode(x):
        codes = sae.encode(x)
        return codes, sae.decode(codes, like=x)

    return encode_and_decode


def write(folder: Path, every: Sequence[Measured]) -> None:
    """Write what was measured as a page and as JSON."""
    about: dict[str, Any] = {"processor": processor("cpu"), "cores": os.cpu_count()}
    about |= {"load average": round(os.getloadavg()[0], 1)}
    about |= {name: version_of(name) for name in (*PACKAGES, "transformers")}
    page = [", ".join(f"{name} {value}" for name, value in about.items())]
    for measured in every:
        page += [f"## {measured.size}, {measured.steps} steps", run_table(measured)]
        page += [f"{name} was not run: {reason}" for name, reason in measured.failures.items()]
    (folder / "end_to_end.md").write_text("\n\n".join(page) + "\n")
    text = json.dumps(about | {"measured": [asdict(measured) for measured in every]}, indent=1)
    (folder / "end_to_end.json").write_text(text)


def run_table(measured: Measured) -> str:
    """Return a row for each contender: medians, and ratios with their least and largest."""
    tokens = measured.size.tokens * measured.steps
    rows = []
    for name, runs in measured.runs.items():
        if not runs:
            continue
        ours = measured.runs[RATIO_TO[name]]
        cpu, wall = (median(getattr(r, f"training_{c}") for r in runs) for c in ("cpu", "wall"))
        rows.append(
            [
                name,
                f"{cpu:.0f}",
                f"{tokens / cpu:,.0f}",
                ratios(runs, ours, "training_cpu"),
                f"{wall:.0f}",
                ratios(runs, ours, "training_wall"),
                f"{median(run.startup_cpu for run in runs):.0f}",
                f"{median(run.peak for run in runs) / 2**20:,.0f}",
                f"{median(run.fvu for run in runs):.3f}",
                f"{median(run.l0 for run in runs):.1f}",
            ]
        )
    header = ["training", "CPU s", "tokens/CPU s", "/ ours", "wall s", "/ ours"]
    return table([*header, "start-up CPU s", "peak MiB", "held-out FVU", "L0"], rows)


def ratios(runs: Sequence[Run], ours: Sequence[Run], what: str) -> str:
    """Return the median of the ratios of each round, and the least and largest of them."""
    pairs = zip(runs, ours, strict=False)  # a round may be under way
    each = [getattr(run, what) / getattr(own, what) for run, own in pairs]
    return f"{median(each):.2f} ({min(each):.2f}-{max(each):.2f})" if each else ""


if __name__ == "__main__":
    main()
