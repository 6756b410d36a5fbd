"""Trains every architecture in a regime where features die, and measures what each is worth.

    python -m benchmarks.evidence [--work runs/evidence] [--processes 2] [--threads 1] [--only TEXT]

On the language model that ships with the package: 5 million tokens for each SAE, thresholds set so
that each has k matches a token on the text it is measured on. Activations are computed once. Each
SAE adds a line to `benchmarks/evidence.jsonl`; those that have one are not made again, and a run
that was interrupted goes on from its last checkpoint. The first of the grid matter most: by the
time of a step, a run of 8,192 features is ten minutes on one core, and the whole grid days.
`python -m benchmarks.evidence_tables` makes tables and figures of what there is.

Another model, in a folder, with a file of results of its own:

    python -m benchmarks.evidence --model FOLDER --layer 3 --tokens 2_000_000 --sizes 6144 \\
        --work runs/evidence_of_it --results benchmarks/evidence_of_it.jsonl
"""

import argparse
import itertools
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.peers import PREFIXES
from notebooks.paper_claims import make_text

RESULTS = Path(__file__).with_suffix(".jsonl")
BATCH = 2048
MANY = 1 << 20  # held-out tokens on which features may fire
MEASURED = 1 << 18  # of these, for everything else
OF_THE_MODEL = 32_768  # for the language model's loss
DEAD_AFTER = 100_000
LEARNING_RATE = 4e-3

NO_AUX, AUX_K, AUX_ZIPF = {"aux_coefficient": 0}, {"dying_below": 0}, {"dying_below": 0.75}
PAPER = {"budgets": "zipf", "min_matches": 1, "per_batch": True}
WANTED_L0 = {"l1_coefficient": 3.85, "l1_warmup_tokens": 200_000}  # where the weight begins
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TopK": ("TopKSAE", {}),
    "Mutual Choice": ("MutualChoiceSAE", {}),
    "Feature Choice": ("FeatureChoiceSAE", {}),
    "Mutual Choice, the paper's": ("MutualChoiceSAE", {"rank_discount": 0}),
    "Feature Choice, the paper's": ("FeatureChoiceSAE", PAPER),
    "TopK, no auxiliary loss": ("TopKSAE", NO_AUX),
    "TopK, aux_zipf_loss": ("TopKSAE", AUX_ZIPF),
    "Mutual Choice, no auxiliary loss": ("MutualChoiceSAE", NO_AUX),
    "Mutual Choice, aux_k_loss": ("MutualChoiceSAE", AUX_K),
    "Feature Choice, uniform": ("FeatureChoiceSAE", {"budgets": "uniform"}),
    "Feature Choice, rank_discount 0": ("FeatureChoiceSAE", {"rank_discount": 0}),
    "Standard, resampled": ("StandardSAE", WANTED_L0),
    "JumpReLU": ("JumpReLUSAE", {"bandwidth": 0.03}),  # more than a step, as in jumprelu.yaml
    "Gated": ("GatedSAE", {}),
    "Matryoshka": ("MutualChoiceSAE", {"prefixes": PREFIXES}),
}
"""By name: the class, and what is not its default; prefixes are shares of the features."""
CHIEF = tuple(VARIANTS)[:3]


@dataclass(frozen=True)
class Run:
    """One SAE of the grid."""

    variant: str
    n_features: int
    k: int
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, F={self.n_features}, k={self.k}, seed {self.seed}"


@dataclass(frozen=True)
class Place:
    """What all runs have in common: whose activations, how many, and where they are kept."""

    work: Path
    model: str
    layer: int
    tokens: int

    @property
    def held_out(self) -> Path:
        """The file of activations to measure on."""
        return self.work / "held_out.safetensors"

    def activations(self, seed: int, **options: Any) -> Any:
        """Return the data module of a run."""
        from lightning_sae import ActivationDataModule

        return ActivationDataModule(
            self.model,
            layer=self.layer,
            text=str(self.work / "text"),
            batch_size=BATCH,
            validation_tokens=OF_THE_MODEL,
            cache_dir=str(self.work / "cache"),
            cache_dtype="float16",
            seed=seed,
            **options,
        )


def grid(sizes: Sequence[int]) -> Iterator[Run]:
    """Yield all runs with these numbers of features, those that say most first."""
    order = [
        *itertools.product(CHIEF, sizes[:1], [16], [0, 1, 2]),
        *itertools.product(VARIANTS, sizes[:1], [16], [0]),
        *itertools.product(CHIEF, sizes[:1], [32], [0]),
        *itertools.product(CHIEF, sizes, [16], [0]),
        *itertools.product(VARIANTS, sizes, [16, 32], [0, 1, 2]),
    ]
    yield from dict.fromkeys(Run(*each) for each in order)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    done = {Run(**json.loads(line)["run"]) for line in lines}
    todo = [run for run in grid(given.sizes) if run not in done and given.only in str(run)]
    place = Place(given.work, given.model, given.layer, given.tokens)
    prepare(place)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        made = [pool.submit(train_and_measure, run, place, given.threads) for run in todo]
        for each in as_completed(made):
            result = each.result()
            with given.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(Run(**result["run"]), f"FVU {result['fvu']:.4f}", flush=True)


def prepare(place: Place) -> None:
    """Compute what all runs share: the text, activations of it, and those to measure on."""
    import torch

    from lightning_sae.tensor_files import save_tensors

    place.work.mkdir(parents=True, exist_ok=True)
    make_text(place.work / "text")
    if place.held_out.exists():
        return
    data = place.activations(seed=0, test_tokens=MANY)
    data.prepare_data()
    data.setup("test")
    batches = [batch["activations"].half() for batch in data.test_dataloader()]
    save_tensors({"activations": torch.cat(batches)[:MANY]}, place.held_out)


def train_and_measure(run: Run, place: Place, threads: int) -> dict[str, Any]:
    """Train one SAE, and return what it is worth."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    import lightning_sae
    from benchmarks.evidence_measures import Course, measure
    from lightning_sae.callbacks import LossRecoveredCallback, ResampleDeadFeatures

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    pl.seed_everything(run.seed)
    name, options = VARIANTS[run.variant]
    folder = place.work / str(run).replace(" ", "_").replace(",", "").replace("'", "")
    if shares := options.get("prefixes"):
        options = {"prefixes": [round(share * run.n_features) for share in shares]}
    data = place.activations(run.seed)
    sae = getattr(lightning_sae, name)(
        data.d_model,
        run.n_features,
        k=run.k,
        dead_after_tokens=DEAD_AFTER,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE, eps=6.25e-10, fused=True),
        **options,
    )
    resampling = [ResampleDeadFeatures(500_000, times=6)] if name == "StandardSAE" else []
    course, quiet = Course(), {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=place.tokens // BATCH,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[
            course,
            *resampling,
            ModelCheckpoint(folder, every_n_train_steps=200, save_top_k=0, save_last=True),
        ],
        **quiet,
    )
    last = folder / "last.ckpt"
    trainer.fit(sae, data, ckpt_path=last if last.exists() else None)
    result = {"run": asdict(run), "cpu_seconds": course.cpu_seconds, "dead_curve": course.dead}
    result |= measure(sae, place.held_out, MEASURED)
    tester = pl.Trainer(logger=False, callbacks=[LossRecoveredCallback(OF_THE_MODEL)], **quiet)
    data = place.activations(seed=0, test_tokens=OF_THE_MODEL)
    (figures,) = tester.test(sae, data, verbose=False)
    # Of a model that predicts tokens, if it is one.
    result["loss_recovered"] = figures.get("test/loss_recovered_mean")
    result["delta_ce"] = figures.get("test/delta_ce")
    sae.save_pretrained(folder.with_name(f"{folder.name}.sae"))
    shutil.rmtree(folder)
    return result


if __name__ == "__main__":
    main()
