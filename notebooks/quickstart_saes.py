"""Makes the SAEs that ship with the package, on its language model: one of each of four rules.

    python notebooks/quickstart_saes.py

They are small, and their matrices are rounded to float16, to be shipped: for examples and tests.
A quarter of an hour on two cores.
"""

from pathlib import Path
from typing import Final

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file

from lightning_sae import (
    ActivationDataModule,
    FeatureChoiceSAE,
    MutualChoiceSAE,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.pretrained import WEIGHTS
from lightning_sae.quickstart import SAES
from lightning_sae.tensor_files import save_tensors

LAYER: Final = 2
N_FEATURES: Final = 1024
K: Final = 16
STEPS: Final = 1000
LEARNING_RATE: Final = 4e-3
CACHE: Final = "runs/quickstart_saes"
"""Keeps activations, which are most of the work, for all four."""


def main() -> None:
    """Train them, round them, and note what they are worth as they are then."""
    for name, kind in {
        "topk": TopKSAE,
        "mutual_choice": MutualChoiceSAE,
        "feature_choice": FeatureChoiceSAE,
        "standard": StandardSAE,
    }.items():
        data = ActivationDataModule("quickstart", layer=LAYER, batch_size=2048, cache_dir=CACHE)
        pl.seed_everything(0)
        sae = kind(data.d_model, N_FEATURES, k=K)
        sae.lr = LEARNING_RATE
        trainer = pl.Trainer(
            max_steps=STEPS,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(sae, data)
        ship(sae, data, SAES / name)


def ship(sae: SparseAutoencoder, data: ActivationDataModule, folder: Path) -> None:
    """Write an SAE to a folder, its matrices in float16, and its figures as they are then."""
    with torch.no_grad():
        for matrix in (sae.encoder.weight, sae.decoder.weight):
            matrix.copy_(matrix.half())
    trainer = pl.Trainer(logger=False, callbacks=[LossRecoveredCallback()])
    trainer.validate(sae, data)
    sae.note_figures()
    sae.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    for name in ("encoder.weight", "decoder.weight"):
        tensors[name] = tensors[name].half()
    save_tensors(tensors, folder / WEIGHTS, format="pt")


if __name__ == "__main__":
    main()
