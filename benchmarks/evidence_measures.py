"""What a trained SAE is worth, and which of its features: for `benchmarks.evidence`."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae import SparseAutoencoder
from lightning_sae.matches import Matches
from lightning_sae.zipf import ZipfFitError, fit_zipf

EVERY = 100  # steps between points of the curve
AT_ONCE = 4096  # tokens


class Course(Callback):
    """Notes how a run goes on, and what it takes, also where it is interrupted.

    Attributes:
        dead: Tokens seen, and features that have not fired for `dead_after_tokens`.
    """

    def __init__(self) -> None:
        self.dead: list[tuple[int, int]] = []
        self._seconds_before, self._start = 0.0, time.process_time()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the run, with what it took before it was interrupted."""
        return self._seconds_before + time.process_time() - self._start

    def on_train_start(self, *_: Any) -> None:
        """Begin to count."""
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: SparseAutoencoder, *_: Any, **__: Any
    ) -> None:
        """Note a point."""
        if trainer.global_step % EVERY == 0:
            self.dead.append((int(module.tokens_seen), int(module.history.dead().sum())))

    def state_dict(self) -> dict[str, Any]:
        """Return what there is so far."""
        return {"dead": self.dead, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.dead = [tuple(point) for point in state_dict["dead"]]
        self._seconds_before = state_dict["cpu_seconds"]


@torch.no_grad()
def measure(sae: SparseAutoencoder, file: Path, tokens: int) -> dict[str, Any]:
    """Return all figures; thresholds are calibrated on the first tokens of the file, and stay so.

    Args:
        sae: A trained SAE.
        file: Where held-out activations are.
        tokens: So many of them for all but densities.
    """
    everything = load_file(file)["activations"]
    x = everything[:tokens].float()
    sae.eval()
    own = _share_unexplained(sae, x)
    if hasattr(sae, "calibrate"):
        sae.calibrate(x)
    counts = torch.zeros(sae.n_features, dtype=torch.int64)
    for part in everything.split(AT_ONCE):
        counts += sae.match(part.float()).per_feature()
    density = counts / len(everything)
    order = density.argsort()
    rarest = {}
    for name, share in (("quarter", 4), ("half", 2)):
        without = torch.ones(sae.n_features, dtype=torch.bool)
        without[order[: sae.n_features // share]] = False
        rarest[name] = _share_unexplained(sae, x, without)["fvu"]
    return {
        "own": own,
        **_share_unexplained(sae, x),
        "tokens": len(everything),
        "never_fired": int((counts == 0).sum()),
        "fired_less_than_5_times": int((counts < 5).sum()),
        "fvu_without_rarest": rarest,
        "densities": _by_rank(density),
        **_law(density, len(everything)),
        **_duplicates(sae.W_dec.detach()),
    }


def _share_unexplained(
    sae: SparseAutoencoder, x: Tensor, features: Tensor | None = None
) -> dict[str, float]:
    """Return FVU and L0, of the codes of some features, bool, or of all."""
    squared, count, spread = 0.0, 0, (x - x.mean(0)).double().square().sum().item()
    for part in x.split(AT_ONCE):
        matches: Matches = sae.match(part)
        if features is not None:
            matches = matches.select(features[matches.feature])
        error = part - sae.reconstruct(matches) / sae.scales(part)
        squared += error.double().square().sum().item()
        count += len(matches)
    return {"fvu": squared / spread, "l0": count / len(x)}


def _by_rank(density: Tensor) -> list[tuple[int, float]]:
    """Return ranks, as far apart as a logarithmic axis shows them, and their densities."""
    last = len(density)
    ranks = torch.logspace(0, math.log10(last), 200).round().clamp(1, last).long().unique()
    values = density.sort(descending=True).values[ranks - 1]
    return [(r, round(v, 8)) for r, v in zip(ranks.tolist(), values.tolist(), strict=True)]


def _law(density: Tensor, tokens: int) -> dict[str, float]:
    try:
        law = fit_zipf(density, tokens)
    except ZipfFitError:
        return {}
    return {"zipf_r2": law.r2, "zipf_r2_middle": law.r2_middle, "zipf_exponent": law.exponent}


def _duplicates(directions: Tensor) -> dict[str, float]:
    """Return how alike a direction and its nearest are: the mean cosine, and the share of 0.9."""
    nearest = []
    for start in range(0, len(directions), AT_ONCE):
        cosines = directions[start : start + AT_ONCE] @ directions.T
        rows = torch.arange(len(cosines))
        cosines[rows, rows + start] = -1
        nearest.append(cosines.amax(1))
    largest = torch.cat(nearest)
    return {
        "nearest_cosine": largest.mean().item(),
        "duplicates": (largest > 0.9).float().mean().item(),
    }
