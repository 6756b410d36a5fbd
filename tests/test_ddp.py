"""Two processes started by the real command line, against one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": "4",
    "trainer.val_check_interval": "4",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "model.n_features": "512",
    "data.batch_size": "512",
    "data.batches_per_block": "4",
    "data.validation_tokens": "1024",
}


def fit(folder: Path, config: str, *overlays: str) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "lightning_sae", "fit", "--config", config]
    for overlay in overlays:
        command += ["--config", overlay]
    command += [f"--{key}={value}" for key, value in SETTINGS.items()]
    run = subprocess.run(  # noqa: S603 - our own program
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (checkpoint,) = folder.rglob("last.ckpt")
    return torch.load(checkpoint, weights_only=True)


def test_topk_trains_the_same_on_two_processes(tmp_path: Path):
    """A token's choice is its own, so the number of processes must not show."""
    one = fit(tmp_path / "one", "topk.yaml")
    two = fit(tmp_path / "two", "topk.yaml", "trainer/ddp.yaml")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert two["state_dict"]["tokens_seen"] == 4 * 512
