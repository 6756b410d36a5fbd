"""What else of Lightning an SAE meets: every precision, accumulated gradients, averaged weights."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from tests.helpers.architectures import activations, every_architecture

pytestmark = pytest.mark.filterwarnings(
    "ignore:SWA is currently only supported every epoch",
    "ignore:Detected call of `lr_scheduler.step",
)
DTYPES = {  # but for 16-mixed: see below
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


def fit(sae: pl.LightningModule, **options) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    x = DataLoader(activations(512), batch_size=128)
    trainer.fit(sae, x, x)
    return trainer


@every_architecture
@pytest.mark.parametrize("precision", DTYPES)
def test_every_precision_trains(make, precision: str):
    adam = partial(torch.optim.Adam, lr=1e-2, eps=1e-4, fused=True)
    sae = make(optimizer=adam)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    trainer = fit(sae, precision=precision, max_epochs=10, num_sanity_val_steps=0, **options)
    assert sae.W_dec.dtype == DTYPES[precision]
    assert trainer.global_step == 20
    assert int(sae.tokens_seen) == 10 * 512
    assert trainer.callback_metrics["val/fvu"] < 1
    norms = sae.state_dict()["decoder.weight"].float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-2, rtol=0)


@every_architecture
def test_scaled_losses_of_float16_train(make):
    """Lightning takes `16-mixed` for `bf16-mixed` on a CPU, but not as a plugin."""
    # A fused Adam would unscale gradients itself, too late for them to be clipped.
    sae = make(optimizer=partial(torch.optim.Adam, lr=1e-2))
    scaled = MixedPrecision("16-mixed", "cpu")
    trainer = fit(sae, plugins=scaled, max_epochs=10, num_sanity_val_steps=0, gradient_clip_val=1.0)
    assert sae.W_dec.dtype == torch.float32
    assert trainer.global_step == 40
    assert int(sae.tokens_seen) == 10 * 512
    assert trainer.callback_metrics["val/fvu"] < 1
    norms = sae.state_dict()["decoder.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@every_architecture
def test_weights_may_be_averaged_stochastically(make):
    sae = make()
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=0.5)
    fit(sae, max_epochs=4, callbacks=[average], num_sanity_val_steps=0)
    assert int(sae.tokens_seen) == 4 * 512  # counts are counts
    norms = sae.state_dict()["decoder.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    sae.eval()
    assert torch.isfinite(sae(activations())).all()
