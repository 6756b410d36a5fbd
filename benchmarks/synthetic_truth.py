"""Trains every architecture on activations of known features, and measures what each finds of them.

    python -m benchmarks.synthetic_truth [--only TEXT] [--sweep]

Three kinds of truth: features whose densities follow a Zipf law, the same but correlated, and the
same but with children that fire only where their parent does. Each SAE is as large as the truth,
and trained to as many matches a token as features fire. Ten minutes of CPU time, on one core.
Each SAE adds a line to `benchmarks/synthetic_truth.jsonl`; those that have one
are not made again. `--sweep` tries learning rates instead, on a seed that is not measured, and adds
to `synthetic_truth_sweep.jsonl`. `python -m benchmarks.synthetic_truth_tables` makes tables and a
figure of what there is.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import lightning_sae
from lightning_sae import Matches, SparseAutoencoder
from lightning_sae.data import KnownFeatures
from lightning_sae.metrics import (
    L0,
    DeadFeatures,
    FeatureAbsorption,
    FeatureClassification,
    FractionOfVarianceUnexplained,
    direction_statistics,
)

RESULTS = Path(__file__).with_suffix(".jsonl")
SWEEP = RESULTS.with_stem("synthetic_truth_sweep")
D_MODEL, FEATURES, TRUE_L0 = 32, 128, 4
BATCH, STEPS, HELD_OUT = 512, 700, 16_384
SWEPT = 100  # the seed that learning rates are chosen on
RATES = (2e-3, 4e-3, 8e-3)

TRUTHS: dict[str, dict[str, Any]] = {
    "Zipf": {},
    "correlated": {"correlation": 0.5},
    "hierarchical": {"children": 3},
}
LATER = {"mutual_choice_tokens": 85 * STEPS * BATCH // 100}
LOW = {"l1_coefficient": 0.05}  # at first nearly all pairs match, and the weight rises by itself
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "TopK": ("TopKSAE", {}, 8e-3),
    "Mutual Choice": ("MutualChoiceSAE", {}, 8e-3),
    "Feature Choice": ("FeatureChoiceSAE", LATER, 8e-3),
    "Standard": ("StandardSAE", LOW, 8e-3),
    "JumpReLU": ("JumpReLUSAE", {"bandwidth": 0.2}, 8e-3),
    "Gated": ("GatedSAE", {}, 8e-3),
    "Matryoshka": ("MutualChoiceSAE", {"prefixes": [4, 12, 28, 60]}, 8e-3),
    "Feature Choice, Zipf budgets": ("FeatureChoiceSAE", LATER | {"budgets": "zipf"}, 8e-3),
    "Feature Choice, uniform budgets": ("FeatureChoiceSAE", LATER | {"budgets": "uniform"}, 8e-3),
}
"""By name: the class, what is not its default, and the learning rate.

`--sweep` found the rate; what is Mutual Choice at first has that of Mutual Choice.
"""
CHIEF = tuple(VARIANTS)[:7]


@dataclass(frozen=True)
class Run:
    """One SAE of the grid."""

    variant: str
    truth: str
    seed: int
    lr: float

    def __str__(self) -> str:
        return f"{self.variant}, {self.truth}, seed {self.seed}, lr={self.lr:g}"


def grid() -> Iterator[Run]:
    """Yield all runs, seed by seed."""
    for seed, truth, variant in itertools.product([0, 1, 2], TRUTHS, VARIANTS):
        if variant in CHIEF or truth == "Zipf":
            yield Run(variant, truth, seed, VARIANTS[variant][2])


def sweep() -> Iterator[Run]:
    """Yield the runs that learning rates are chosen by."""
    for lr, variant in itertools.product(RATES, CHIEF):
        if variant not in ("Feature Choice", "Matryoshka"):
            yield Run(variant, "Zipf", SWEPT, lr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    file, runs = (SWEEP, sweep()) if given.sweep else (RESULTS, grid())
    lines = file.read_text().splitlines() if file.exists() else []
    done = {Run(**json.loads(line)["run"]) for line in lines}
    for run in (run for run in runs if run not in done and given.only in str(run)):
        result = train_and_measure(run)
        with file.open("a") as results:
            results.write(json.dumps(result) + "\n")
        shown = {name: round(result[name], 3) for name in ("fvu", "l0", "mmcs_true", "feature_f1")}
        print(run, shown, f"{result['cpu_seconds']:.0f} s", flush=True)


@functools.lru_cache(maxsize=1)
def drawn(name: str, seed: int, steps: int) -> tuple[KnownFeatures, list[Tensor]]:
    """Return a truth and the batches to train on, which all variants share."""
    truth = KnownFeatures(D_MODEL, FEATURES, TRUE_L0, seed=seed, **TRUTHS[name])
    parts = [truth.activations(truth.draw(BATCH, key=(4, step))) for step in range(steps)]
    return truth, parts


def train_and_measure(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """Train one SAE, and return what it is worth."""
    truth, batches = drawn(run.truth, run.seed, steps)
    torch.manual_seed(run.seed)
    name, options, _ = VARIANTS[run.variant]
    sae = getattr(lightning_sae, name)(
        D_MODEL, FEATURES, k=TRUE_L0, dead_after_tokens=100_000, **options
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=run.lr, eps=6.25e-10, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    start = time.process_time()
    for x in batches:
        loss, _ = sae.loss(x)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.normalize_decoder()
        decay.step()
    seconds = time.process_time() - start
    return {"run": asdict(run), "cpu_seconds": seconds, **measure(sae, truth)}


@torch.no_grad()
def measure(sae: SparseAutoencoder, truth: KnownFeatures) -> dict[str, float]:
    """Return all figures on held-out tokens; thresholds are calibrated on others before."""
    sae.eval()
    if hasattr(sae, "calibrate"):
        sae.calibrate(truth.activations(truth.draw(HELD_OUT, key=(5, 0))))
    true_codes = truth.draw(HELD_OUT, key=(5, 1))
    x = truth.activations(true_codes)
    codes = sae.match(x)
    fvu, l0, dead = FractionOfVarianceUnexplained(D_MODEL), L0(), DeadFeatures(FEATURES)
    fvu.update(sae.reconstruct(codes) / sae.scales(x), x)
    l0.update(codes)
    dead.update(codes)
    figures = {"fvu": fvu.compute(), "l0": l0.compute(), "dead_fraction": dead.compute()}
    figures |= direction_statistics(sae.W_dec, truth.directions)
    classification = FeatureClassification(sae.W_dec, truth.directions)
    classification.update(codes, true_codes)
    figures |= classification.compute()
    general = int(truth.parent.max()) + 1  # they are the first
    if general:
        absorption = FeatureAbsorption(sae.W_dec, truth.directions[:general])
        some = true_codes.select(true_codes.feature < general)
        concepts = Matches(some.token, some.feature, some.value, (len(x), general))
        scales = sae.scales(x).expand(len(x), 1)[codes.token, 0]
        absorption.update(codes.with_values(codes.value / scales), x, concepts)
        figures |= absorption.compute()
    return {name: value.item() for name, value in figures.items()}


if __name__ == "__main__":
    main()
