"""An SAE on a layer of somebody's model, whose own training it leaves as it is."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import MutualChoiceSAE, UsageError
from lightning_sae.callbacks import TrainSAE
from tests.callbacks.fakes import trainer

WIDTH = 8
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before",
    "ignore:Checkpoint directory",
    "ignore:The dirpath has changed",
    "ignore:You defined a `validation_step` but have no",
    "ignore:Be aware that when using `ckpt_path`",
)


class Classifier(pl.LightningModule):
    """Somebody's model, with dropout, so that random numbers matter."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.last = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self.last(self.first(x)), y)
        self.log("loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batches: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=64)


def sae(seed: int = 1) -> MutualChoiceSAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MutualChoiceSAE(WIDTH, 24, k=2)


def trained(folder, *callbacks, **options) -> tuple[pl.Trainer, Classifier]:
    torch.manual_seed(0)
    module = Classifier(options.pop("dropout", 0.5))
    ckpt_path = options.pop("ckpt_path", None)
    run = trainer(folder, *callbacks, num_sanity_val_steps=1, **options)
    run.fit(module, loader(), loader(2), ckpt_path=ckpt_path)
    return run, module


def test_the_model_is_trained_as_without_it_bit_for_bit(tmp_path):
    _, alone = trained(tmp_path, max_epochs=2)
    callback = TrainSAE(sae(), "first")
    _, watched = trained(tmp_path, callback, max_epochs=2)
    assert watched.state_dict().keys() == alone.state_dict().keys()
    assert all(map(torch.equal, watched.state_dict().values(), alone.state_dict().values()))
    assert not watched.first._forward_hooks


def test_the_sae_learns_and_is_measured_on_what_the_layer_gives_out(tmp_path):
    callback = TrainSAE(sae(), "first", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    run, module = trained(tmp_path, callback, max_epochs=20)
    logged = run.callback_metrics
    assert logged["sae/train/l0"] == pytest.approx(2)
    assert int(callback.sae.tokens_seen) == 20 * 6 * 64
    module.eval()
    x = torch.cat([module.first(x) for x, _ in loader(2)]).detach()
    with torch.no_grad():
        reconstruction = callback.sae(x)
    error = (reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()
    assert logged["sae/val/fvu"] == pytest.approx(error.item(), rel=1e-4)
    assert error < 0.1
    names = {name.removeprefix("sae/val/") for name in logged if name.startswith("sae/val/")}
    assert names == callback.sae.measured().keys()
    assert "threshold" in names
    norms = callback.sae.decoder.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24))


def test_positions_may_be_chosen_and_several_may_be_trained(tmp_path):
    first = TrainSAE(sae(), "first", keep=lambda x: x[::2], name="half")
    second = TrainSAE(sae(), "first.1")
    run, _ = trained(tmp_path, first, second)
    assert (int(first.sae.tokens_seen), int(second.sae.tokens_seen)) == (6 * 32, 6 * 64)
    assert {"half/val/l0", "sae/val/l0"} <= run.callback_metrics.keys()


def test_a_resumed_run_goes_on_with_the_sae(tmp_path):
    # Without dropout: its random numbers are other ones in a resumed run, as Lightning has it.
    options = {"max_epochs": 2, "enable_checkpointing": True, "dropout": 0.0}
    whole = TrainSAE(sae(), "first")
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trained(tmp_path, whole, save, **options)
    again = TrainSAE(sae(seed=2), "first")
    save = ModelCheckpoint(tmp_path / "again")
    trained(tmp_path, again, save, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    expected = whole.sae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.sae.state_dict().items())


def test_a_checkpoint_saved_after_the_run_has_the_optimizer_too(tmp_path):
    whole, part, rest = (TrainSAE(sae(seed), "first") for seed in (1, 1, 2))
    trained(tmp_path / "whole", whole, max_epochs=4, dropout=0.0)
    run, _ = trained(tmp_path / "part", part, max_epochs=2, dropout=0.0)
    run.save_checkpoint(tmp_path / "after.ckpt")
    trained(
        tmp_path / "rest", rest, max_epochs=4, dropout=0.0, ckpt_path=str(tmp_path / "after.ckpt")
    )
    assert torch.equal(rest.sae.encoder.weight, whole.sae.encoder.weight)


def test_what_cannot_be_is_told_in_one_line(tmp_path):
    with pytest.raises(
        UsageError, match=r"^layer='nowhere': Classifier has no module of this name$"
    ):
        trained(tmp_path, TrainSAE(sae(), "nowhere"))
    with pytest.raises(UsageError, match=r"^activations are 3 wide, expected d_model=8$"):
        trained(tmp_path, TrainSAE(sae(), "last"))
    module = Classifier()
    module.unused = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match=r"layer='unused' gave out nothing in a training step$"):
        trainer(tmp_path, TrainSAE(sae(), "unused")).fit(module, loader(1))
