"""A process that does nothing but save checkpoints, to be killed."""

import itertools
from pathlib import Path

import torch

from lightning_sae.checkpoint_io import AtomicCheckpointIO

SIZE = 300_000


def checkpoint(number: int) -> dict:
    weights = {"W_dec": torch.full((SIZE,), float(number))}
    return {"number": number, "loops": {}, "state_dict": weights}


def save_forever(path: Path, first: int) -> None:
    for number in itertools.count(first):
        AtomicCheckpointIO().save_checkpoint(checkpoint(number), path)
