"""Runs of the real command line, small, and what to compare between them."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

CALLBACKS = [
    {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 200, "save_last": True}},
    {"class_path": "LearningRateMonitor"},
]
SMALL = {
    "trainer.callbacks": json.dumps(CALLBACKS),
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "model.n_features": 256,
    "data.batch_size": 256,
    "data.batches_per_block": 4,
    "data.context_length": 32,
    "data.held_out_documents": 50,
    "data.validation_tokens": 1024,
    "data.test_tokens": 1024,
    "data.model_batch_size": 8,
}


def arguments(command: str = "fit", config: str = "topk.yaml", **changes: Any) -> list[str]:
    """The command line of a small run; `changes` has __ where keys have dots."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return [command, "--config", config, *(f"--{key}={value}" for key, value in settings.items())]


def write_text(folder: Path) -> Path:
    """A text of its own, because the shipped one takes seconds to tokenize."""
    file = folder / "text.txt"
    words = [f"line {i} = {i * i} and {i % 7}" for i in range(300)]
    file.write_text("\n\n".join(" ".join(words[i : i + 5]) for i in range(295)))
    return file


def command(*args: Any, **changes: Any) -> list[str]:
    """The same as a program of its own."""
    return [sys.executable, "-m", "lightning_sae", *arguments(*args, **changes)]


def processes(folder: Path) -> list[int]:
    """The processes that work in a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (each / "cwd").readlink() == folder:
                found.append(int(each.name))
    return found


def checkpoints(folder: Path) -> list[Path]:
    """All files that look like a checkpoint."""
    return sorted(folder.rglob("*.ckpt"))


def state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that the next step depends on."""
    raw = torch.load(checkpoint, weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return {key: raw[key] for key in (*keys, "ActivationDataModule")}


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def curves(*folders: Path) -> dict[tuple[str, int], float]:
    """All logged values but those of time, by name and step."""
    found = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            if name != "train/tokens_per_second":
                found |= {(name, event.step): event.value for event in events.Scalars(name)}
    return found
