"""Makes the runs that `paper_claims.ipynb` reports, each by the command line of `lightning_sae`.

    python notebooks/paper_claims.py

Each run adds a line to `paper_claims.jsonl`, and a run that has one is not made again: it can be
interrupted. On two cores the whole takes about an hour and a half.

To repeat it on GPT-2 small, set `MODEL` to `["--config", "models/gpt2_small.yaml"]` and move the
results away. Runs are then as large and as long as that file says, so use a GPU; it has not been
done. The penalties in `L1` will not give k matches a token there.
"""

import csv
import itertools
import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODEL: list[str] = []  # the language model that ships with the package

HERE = Path(__file__).parent
RESULTS = HERE / "paper_claims.jsonl"
WORK = Path("runs/paper_claims")
PROCESSES = 2  # each of one thread
MANY = 1_100_000  # tokens to look for dead features on

KS = (8, 16, 32)
SEEDS = (0, 1, 2)
L1 = {
    8: 4.7,
    16: 3.75,
    32: 3.05,
}  # the penalties that gave about k matches a token in a first trial

NO_AUX, AUX_K = {"aux_coefficient": 0}, {"dying_below": 0}
# As in the paper; what Feature Choice does by default came later.
ZIPF = {"budgets": "zipf", "per_batch": True, "min_matches": 1}
UNIFORM, FROM_SCRATCH = {"budgets": "uniform", "per_batch": True}, {"mutual_choice_share": 0}
AVERAGE = {"normalize_inputs": "average"}
AS_WAS = AVERAGE | {"rank_discount": 0, "dying_below": 0.75}  # the defaults came later
AFFINITY, TOKEN_NORM, GAIN = (
    {"importance": by} | AS_WAS for by in ("affinity", "token_norm", "gain")
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "topk": ("topk", AVERAGE | NO_AUX),
    "topk, aux_k": ("topk", AVERAGE),
    "mutual": ("mutual_choice", AFFINITY | NO_AUX),
    "mutual, aux_k": ("mutual_choice", AFFINITY | AUX_K),
    "mutual, aux_zipf": ("mutual_choice", AFFINITY),
    "feature uniform": ("feature_choice", AFFINITY | UNIFORM | NO_AUX),
    "feature uniform, aux_zipf": ("feature_choice", AFFINITY | UNIFORM),
    "feature zipf": ("feature_choice", AFFINITY | ZIPF | NO_AUX),
    "feature zipf, aux_zipf": ("feature_choice", AFFINITY | ZIPF),
    "mutual by token_norm, aux_zipf": ("mutual_choice", TOKEN_NORM),
    "feature zipf by token_norm, aux_zipf": ("feature_choice", TOKEN_NORM | ZIPF),
}
TRIED: dict[str, tuple[str, dict[str, Any]]] = {  # for one k only
    "feature zipf from scratch, aux_zipf": ("feature_choice", AFFINITY | ZIPF | FROM_SCRATCH),
    "mutual by gain, aux_zipf": ("mutual_choice", GAIN),
    "mutual by token_norm": ("mutual_choice", TOKEN_NORM | NO_AUX),
    "mutual, aux_zipf below half": ("mutual_choice", AFFINITY | {"dying_below": 0.5}),
    "mutual by token_norm, aux_zipf every 8": ("mutual_choice", TOKEN_NORM | {"aux_every": 8}),
}


def main() -> None:
    """Make the runs that are missing."""
    WORK.mkdir(parents=True, exist_ok=True)
    make_text(WORK / "text")
    done = {name_of(json.loads(line)) for line in RESULTS.open()} if RESULTS.exists() else set()
    wanted = itertools.chain(
        *(itertools.product([seed], KS, VARIANTS) for seed in SEEDS),
        itertools.product(SEEDS, [16], TRIED),
    )
    todo = [name for name in wanted if name not in done]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for result in pool.map(train_and_test, *zip(*todo, strict=True)) if todo else ():
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(*name_of(result), f"{result['fit_seconds']:.0f} s", flush=True)


def name_of(result: dict[str, Any]) -> tuple[int, int, str]:
    """Return what tells a run from all others."""
    return result["seed"], result["k"], result["variant"]


def train_and_test(seed: int, k: int, variant: str) -> dict[str, Any]:
    """Train and test one SAE through the command line, and return what the test measured."""
    import torch

    from lightning_sae.cli import main as lightning_sae

    torch.set_num_threads(1)
    config, changes = (VARIANTS | TRIED)[variant]
    changes = changes | ({"l1_coefficient": L1[k]} if config == "standard" else {"k": k})
    folder = WORK / f"{variant.replace(' ', '_')}-{k}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [
        *("--config", f"{config}.yaml", "--config", str(HERE / "paper_claims.yaml"), *MODEL),
        *(f"--model.{key}={value}" for key, value in changes.items()),
        *(f"--seed_everything={seed}", f"--trainer.logger.save_dir={folder}"),
        *(() if MODEL else (f"--data.text={WORK / 'text'}", f"--data.cache_dir={WORK / 'cache'}")),
    ]
    sys.argv = ["lightning_sae"]
    with redirect_stdout(StringIO()):
        start = time.monotonic()
        lightning_sae(["fit", *arguments])
        seconds = time.monotonic() - start
        test = ["test", *arguments, f"--ckpt_path={folder}/version_0/checkpoints/last.ckpt"]
        lightning_sae(test)
        if config == "feature_choice":  # whose claim is that no feature is dead
            lightning_sae([*test, f"--data.test_tokens={MANY}", "--trainer.callbacks=null"])
    result = {"variant": variant, "k": k, "seed": seed, "fit_seconds": seconds}
    result |= measured(folder / "version_1")
    if config == "feature_choice":
        again = measured(folder / "version_2")
        result |= {"dead_of_many": again["dead_fraction"], "many_tokens": again["tokens"]}
    shutil.rmtree(folder)
    return result


def measured(folder: Path) -> dict[str, float]:
    """Return what a test logged."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        key.removeprefix("test/"): float(value)
        for row in rows
        for key, value in row.items()
        if key.startswith("test/") and value
    }


def make_text(folder: Path) -> None:
    """Write the shipped text, with more to test on: the Python sources of the installed torch.

    The held-out part of the shipped text is less than the million tokens that a test for dead
    features wants. The language model has seen no sources of torch.
    """
    import datasets
    import torch

    from lightning_sae.quickstart import TEXT

    if folder.exists():
        return
    train, held_out = (
        datasets.Dataset.from_parquet(str(TEXT / f"{split}.parquet")).select_columns("text")
        for split in ("train", "validation")
    )
    files = sorted(Path(torch.__file__).parent.glob("nn/**/*.py"))
    more = datasets.Dataset.from_dict({"text": [file.read_text() for file in files]})
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    train.to_parquet(unfinished / "train.parquet")
    datasets.concatenate_datasets([held_out, more]).to_parquet(unfinished / "validation.parquet")
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
