"""The metrics inside a LightningModule of somebody else."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lightning_sae.metrics import L0, FeatureDensity
from tests.metrics.samples import D_MODEL, N_FEATURES, all_metrics, sample, values


class Foreign(pl.LightningModule):
    """Logs metric objects and a collection, as any project would."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D_MODEL, 1)
        self.l0 = L0()
        self.density = FeatureDensity(N_FEATURES)
        names = ("l0_std", "dead", "fvu")
        self.others = MetricCollection({name: all_metrics()[name] for name in names}, prefix="val/")
        self.fires: list[int] = []

    def training_step(self, batch):
        return self.layer(batch["activations"].to(self.layer.weight.dtype)).square().mean()

    def validation_step(self, batch):
        self.l0.update(batch["codes"])
        self.density.update(batch["codes"])
        self.others.update(**batch)
        self.log("val/l0", self.l0)
        self.log_dict(self.others)

    def on_validation_epoch_end(self):
        self.fires = self.density.fires.tolist()
        self.density.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(precision: str) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def batches(precision: str, count: int) -> list[dict[str, torch.Tensor]]:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    made = [sample(5, seed) for seed in range(count)]
    return [{name: tensor.to(dtype) for name, tensor in batch.items()} for batch in made]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_logged_metrics_are_exact_at_every_precision(precision):
    data = batches(precision, count=160)
    expected = values(data)
    loader = DataLoader(data, batch_size=None)
    module = Foreign()
    runner = trainer(precision)
    before = runner.validate(module, loader, verbose=False)[0]  # in inference mode, unlike fit()
    assert before["val/l0"] == pytest.approx(expected["l0"].item(), rel=1e-6)
    runner.fit(module, loader, loader)
    for name in ("l0", "l0_std", "dead", "fvu"):  # each epoch started from zero
        logged = runner.callback_metrics[f"val/{name}"]
        torch.testing.assert_close(logged, expected[name], rtol=1e-6, atol=0)
    assert max(module.fires) > 256  # beyond what bfloat16 counts
    assert module.fires == torch.cat([batch["codes"] for batch in data]).gt(0).sum(0).tolist()
