import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sae.callbacks import FiniteWeights
from tests.callbacks.fakes import FakeSAE, tensors, trainer

BROKEN = [torch.nan, torch.inf, -torch.inf]
SHAPES = [(), (3,), (2, 3), (4, 2, 3, 3)]


def module_with(weights: torch.Tensor) -> pl.LightningModule:
    """A module of somebody else, with parameters of many kinds."""
    module = pl.LightningModule()
    module.layer = nn.Linear(2, 3)
    module.empty = nn.Parameter(torch.empty(0, 4))
    module.table = nn.Parameter(torch.arange(3), requires_grad=False)
    module.own = nn.Parameter(weights)
    return module


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_weights_that_are_not_finite_are_not_saved(value, shape, dtype):
    weights = torch.zeros(shape, dtype=dtype)
    weights += torch.finfo(dtype).max / 2  # large, but numbers
    module, run = module_with(weights), pl.Trainer(accelerator="cpu", logger=False)
    FiniteWeights().on_save_checkpoint(run, module, {})
    one = (torch.view_as_real(module.own.data) if dtype.is_complex else module.own.data).view(-1)
    one[-1] = value
    with pytest.raises(ValueError, match=r"own has NaN or Inf after 0 steps"):
        FiniteWeights().on_save_checkpoint(run, module, {})


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_last_checkpoint_is_a_good_one(tmp_path):
    class Breaks(FakeSAE):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 3:
                self.factor.data.fill_(torch.nan)

    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    run = trainer(tmp_path, save, FiniteWeights(), enable_checkpointing=True)
    with pytest.raises(ValueError, match="factor has NaN or Inf after 4 steps"):
        run.fit(Breaks(), tensors(6))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["state_dict"]["factor"].isfinite()
