"""The least that the callbacks ask of a module, its data and a language model."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureDensity
from tests.helpers.matches import matches_where

D_MODEL, N_FEATURES, TOKENS = 4, 40, 30  # of a batch
LENGTH = 6  # of a context


class FakeSAE(pl.LightningModule):
    """A linear layer; it counts tokens and densities as an SAE does, and doubles activations."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(D_MODEL, N_FEATURES)
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("tokens_seen", torch.tensor(0))
        self.register_buffer("input_mean", torch.full((D_MODEL,), 0.25))
        self.feature_density = FeatureDensity(N_FEATURES)

    def forward(self, x):
        assert not self.training
        return self.factor * x

    def match(self, x) -> Matches:
        assert not self.training
        affinities = self.encoder(x)
        return matches_where(affinities, affinities > 0.3)

    def training_step(self, batch):
        x = activations(batch)
        self.tokens_seen += len(x)
        return self.encoder(x).square().mean() + self.factor.square()

    def validation_step(self, batch):
        self.feature_density.update(self.encoder(activations(batch)))

    def test_step(self, batch):
        self.validation_step(batch)

    def predict_step(self, batch) -> Matches:
        return self.match(activations(batch))

    def on_validation_epoch_end(self):
        self.feature_density.reset()

    def on_test_epoch_end(self):
        self.log("test/fvu", 0.25)
        self.feature_density.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FakeLanguageModel:
    """Activations are embeddings, and logits their products with the embeddings."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(9, D_MODEL, generator=generator)
        self.model = nn.ParameterList([nn.Parameter(self.embeddings, requires_grad=False)])
        self.runs = 0

    def replace(self, input_ids, edit):
        assert not torch.is_grad_enabled()
        self.runs += 1
        return edit(self.embeddings[input_ids]) @ self.embeddings.T


class FakeData(pl.LightningDataModule):
    """Batches of contexts, as `ActivationDataModule` yields them for validation."""

    def __init__(self, count=3, residual_stream=True):
        super().__init__()
        self.batches = contexts(count)
        self.residual_stream = FakeLanguageModel() if residual_stream else None

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def contexts(count):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        input_ids = torch.randint(9, (5, LENGTH), generator=generator)
        kept = torch.rand(5, LENGTH, generator=generator) < 0.8
        x = torch.randn(int(kept.sum()), D_MODEL, generator=generator)
        made.append({"activations": x, "input_ids": input_ids, "kept": kept})
    return made


def first_contexts(count, batches):
    """The batches with no more than so many contexts, of which each has five."""
    cut = []
    for number, batch in enumerate(batches):
        here = {name: batch[name][: max(count - 5 * number, 0)] for name in ("input_ids", "kept")}
        cut.append({**here, "activations": batch["activations"][: int(here["kept"].sum())]})
    return cut


def tensors(count=4):
    """A loader of plain activations."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(TOKENS, D_MODEL, generator=generator) for _ in range(count)]
    return DataLoader(rows, batch_size=None)


def activations(batch):
    return batch["activations"] if isinstance(batch, dict) else batch


def trainer(folder, *callbacks, **options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | options))
