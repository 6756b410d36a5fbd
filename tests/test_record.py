"""What is known of an SAE's training, whatever the run kept."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_sae import ActivationDataModule, TopKSAE, load


def data(cache: Path) -> ActivationDataModule:
    sizes = {"batch_size": 256, "batches_per_block": 2, "validation_tokens": 1024}
    return ActivationDataModule("quickstart", 1, cache_dir=str(cache), **sizes)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, **quiet, **options
    )


def test_what_no_checkpoint_and_no_validation_noted_is_known_at_the_end(tmp_path: Path):
    for loads_a_model in (True, False):  # the second run finds its activations
        torch.manual_seed(0)
        activations = data(tmp_path / "cache")
        sae = TopKSAE(activations.d_model, 64, 4)
        run = trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
        run.fit(sae, activations)
        assert bool(activations.model._streams) == loads_a_model
        in_training = run.callback_metrics["train/l0"].item()
        assert sae.record["measured"] == {"l0_in_training": in_training}

        trainer().validate(sae, data(tmp_path / "cache"), verbose=False)
        assert sae.record["trained_on"]["hook_name"] == "transformer.h.1"
        measured = sae.record["measured"]
        assert measured["l0_in_training"] == in_training
        assert measured["tokens_seen"] == 512
        assert 0 < measured["fvu"] < 1.5
    sae.save_pretrained(tmp_path / "sae")
    again = load(tmp_path / "sae")
    trainer().validate(again, data(tmp_path / "cache"), verbose=False)
    assert again.record["measured"]["l0_in_training"] == in_training
    card = (tmp_path / "sae" / "README.md").read_text()
    assert "| site, as Hugging Face's module | transformer.h.1 |" in card
    assert f"features that fire on a token, in the last training batch | {in_training:g} |" in card
