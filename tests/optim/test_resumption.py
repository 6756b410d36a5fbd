"""A run goes on from a checkpoint only if all that the Trainer restores is there and fits."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler as lr
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import TopKSAE
from lightning_sae.checks import UsageError
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations

# A Trainer that only trains is right for a test, and Lightning remarks on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

FUSED = partial(torch.optim.Adam, lr=1e-3, fused=True)


class OwnOptimizer(TopKSAE):
    """Someone's SAE that makes its optimizer in Lightning's own way."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FUSED(self.parameters())


def run(
    steps: int,
    start: Path | None = None,
    kind: type[TopKSAE] = TopKSAE,
    watch: pl.Callback | None = None,
    **settings: Any,
) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        max_epochs=-1,
        callbacks=watch,
    )
    sae = kind(D_MODEL, N_FEATURES, K, **{"optimizer": FUSED} | settings)
    loader = DataLoader(TensorDataset(activations(2048)), batch_size=128)
    trainer.fit(sae, loader, ckpt_path=start, weights_only=True)
    return trainer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run(3).save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def moments(checkpoint: dict[str, Any], **values: Any) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state.update(values)


@pytest.mark.parametrize("kind", [TopKSAE, OwnOptimizer])
@pytest.mark.parametrize("shape", [(3, 3), (1,), (0,)])
def test_moments_of_another_shape_are_told(saved: Path, shape: tuple, kind: type[TopKSAE]):
    """A fused optimizer would write beyond their end."""
    small = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    run(3, kind=kind).save_checkpoint(saved)
    edit(saved, lambda checkpoint: moments(checkpoint, **small))
    with pytest.raises(UsageError, match=r"the checkpoint has exp_avg\w* of shape \(.*\), not \("):
        run(5, saved, kind)


PROGRESS = "epoch_loop.batch_progress"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("optimizer_states"), "the checkpoint has no optimizer_states"),
        (lambda c: c.pop("lr_schedulers"), "the checkpoint has no lr_schedulers"),
        (lambda c: c.pop("loops"), "the checkpoint has loops.fit_loop=None"),
        (lambda c: c["loops"].pop("fit_loop"), "the checkpoint has loops.fit_loop=None"),
        (
            lambda c: c["loops"]["fit_loop"][PROGRESS]["total"].update(ready=-1),
            f"loops.fit_loop.{PROGRESS}.total.ready=-1",
        ),
        (
            lambda c: c["loops"]["fit_loop"][PROGRESS]["total"].update(ready="3"),
            f"loops.fit_loop.{PROGRESS}.total.ready='3'",
        ),
        (lambda c: c.pop("global_step"), "the checkpoint has global_step=None"),
        (lambda c: c.update(global_step=-1), "the checkpoint has global_step=-1"),
        (lambda c: c["optimizer_states"].clear(), "the checkpoint has 0 optimizer_states, not 1"),
        (
            lambda c: c["optimizer_states"][0]["state"].clear(),
            "decoder.weight it keeps exp_avg and exp_avg_sq and step, and the checkpoint has noth",
        ),
        (lambda c: c["state_dict"].pop("decoder.weight"), "has no matrix decoder.weight"),
        (lambda c: c["state_dict"].pop("encoder.bias"), 'Missing .* "encoder.bias"'),
        (lambda c: c["state_dict"]["input_scale"].zero_(), "input_scale=0 in the state to load"),
    ],
)
def test_what_is_missing_is_told(saved: Path, change: Callable, told: str):
    edit(saved, change)
    with pytest.raises(UsageError, match=told) as caught:
        run(5, saved)
    assert "\n" not in str(caught.value)


def test_what_a_test_needs_is_told(saved: Path):
    edit(saved, lambda checkpoint: checkpoint["loops"].pop("test_loop"))
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    loader = DataLoader(TensorDataset(activations(128)), batch_size=128)
    with pytest.raises(UsageError, match=r"the checkpoint has no loops.test_loop"):
        pl.Trainer(accelerator="cpu", logger=False).test(sae, loader, ckpt_path=saved)


class Rates(pl.Callback):
    """Notes the learning rate and the betas of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.betas: set[tuple[float, float]] = set()

    def on_train_batch_start(self, trainer, *_):
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append(group["lr"])
        self.betas.add(tuple(group["betas"]))


def rates_of(steps: int, start: Path | None = None, **settings: Any) -> list[float]:
    rates = Rates()
    run(steps, start, watch=rates, **settings)
    return rates.seen


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any] | None] = {
    "the default": None,
    "constant": lambda optimizer: lr.ConstantLR(optimizer, factor=1.0),
    "exponential": lambda optimizer: lr.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: lr.CosineAnnealingLR(optimizer, 8),
    "one cycle": lambda optimizer: lr.OneCycleLR(optimizer, 2e-3, total_steps=9),
    "warm-up first": lambda optimizer: lr.SequentialLR(
        optimizer,
        [lr.LinearLR(optimizer, 0.1, total_iters=4), lr.ExponentialLR(optimizer, 0.9)],
        [4],
    ),
}


@pytest.mark.parametrize("before", ["the default", "exponential"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_that_of_a_run_so_configured_from_its_start(
    saved: Path, tmp_path: Path, name: str, before: str
):
    """Whatever it was before; a finished run has brought its own to zero."""
    start = tmp_path / "before.ckpt"
    run(3, lr_scheduler=SCHEDULES[before]).save_checkpoint(start)
    configured = {
        "lr_scheduler": SCHEDULES[name],
        "optimizer": partial(torch.optim.Adam, lr=5e-4, betas=(0.8, 0.99), fused=True),
    }
    assert rates_of(8, start, **configured) == rates_of(8, **configured)[3:]


def test_the_configured_settings_win_and_are_told_once(saved: Path, caplog):
    rates = Rates()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        run(6, saved, watch=rates, optimizer=partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9)))
    assert rates.seen == pytest.approx([1e-4 * (1 - step / 6) / 0.95 for step in (3, 4, 5)])
    assert rates.betas == {(0.5, 0.9)}
    (told,) = (line for line in caplog.messages if "as it is configured" in line)
    assert "betas=(0.5, 0.9) (in the checkpoint (0.9, 0.999))" in told
    assert "initial_lr=0.0001 (in the checkpoint 0.001)" in told


def test_nothing_is_told_where_nothing_changed(tmp_path: Path, caplog):
    settings = {"lr_scheduler": SCHEDULES["exponential"]}
    run(3, **settings).save_checkpoint(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        run(6, tmp_path / "last.ckpt", **settings)
    assert not [line for line in caplog.messages if "as it is configured" in line]


def test_another_optimizer_is_told(saved: Path):
    told = r"optimizer=SGD: of decoder.weight it keeps nothing, and the checkpoint has exp_avg and"
    with pytest.raises(UsageError, match=told):
        run(6, saved, optimizer=partial(torch.optim.SGD, lr=1e-3))


@pytest.mark.parametrize("place", [-1, 10**12, "3", None, 2.5])
def test_a_place_that_is_none_is_told(saved: Path, place: Any):
    edit(saved, lambda checkpoint: checkpoint["lr_schedulers"][0].update(last_epoch=place))
    with pytest.raises(UsageError, match=f"lr_schedulers: last_epoch={place!r} of the checkpoint"):
        run(6, saved)


@pytest.mark.parametrize("state", [[], [{"last_epoch": 3, "base_lrs": ["x"], "optimizer": 1}]])
def test_nothing_else_of_a_saved_schedule_is_taken(saved: Path, state: list):
    edit(saved, lambda checkpoint: checkpoint.update(lr_schedulers=state))
    expected = [1e-3 * (1 - step / 6) / 0.95 for step in (3, 4, 5)]
    assert rates_of(6, saved) == pytest.approx(expected)


class Plateau(TopKSAE):
    """Someone's SAE whose learning rate follows the loss."""

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = FUSED(self.parameters())
        schedule = lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "monitor": "train/loss"},
        }


def test_a_schedule_that_follows_the_loss_goes_on_where_it_was(tmp_path: Path):
    whole, rest = Rates(), Rates()
    run(6, kind=Plateau, watch=whole)
    run(3, kind=Plateau).save_checkpoint(tmp_path / "last.ckpt")
    run(6, tmp_path / "last.ckpt", kind=Plateau, watch=rest)
    assert len(set(whole.seen)) > 3
    assert rest.seen == whole.seen[3:]


class Refusing(pl.LightningDataModule):
    """Data that refuse the place in a checkpoint, as another text does."""

    def train_dataloader(self) -> DataLoader:
        """Return what an SAE of this file trains on."""
        return DataLoader(TensorDataset(activations(2048)), batch_size=128)

    def state_dict(self) -> dict[str, Any]:
        """Return something, so that it is loaded again."""
        return {"place": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse it."""
        raise UsageError("another text")


def test_a_resume_that_was_refused_leaves_nothing_to_the_next_fit(tmp_path: Path):
    def trainer() -> pl.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return pl.Trainer(
            accelerator="cpu", max_steps=4, max_epochs=-1, enable_checkpointing=False, **quiet
        )

    sae, finished = TopKSAE(D_MODEL, N_FEATURES, K, optimizer=FUSED), trainer()
    finished.fit(sae, Refusing())
    finished.save_checkpoint(tmp_path / "finished.ckpt")
    with pytest.raises(UsageError, match="another text"):
        trainer().fit(sae, Refusing(), ckpt_path=tmp_path / "finished.ckpt", weights_only=True)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    again = trainer()
    again.callbacks.append(Rates())
    again.fit(sae, Refusing())
    assert rates == pytest.approx([1e-3, *(1e-3 * (1 - step / 4) / 0.95 for step in (1, 2, 3))])


def test_a_chain_of_schedules_goes_on(tmp_path: Path):
    def chain(optimizer: torch.optim.Optimizer) -> lr.ChainedScheduler:
        return lr.ChainedScheduler(
            [lr.ExponentialLR(optimizer, 0.5), lr.LinearLR(optimizer, 0.1, 1.0, total_iters=8)]
        )

    run(3, lr_scheduler=chain).save_checkpoint(tmp_path / "3.ckpt")
    resumed, whole = run(6, tmp_path / "3.ckpt", lr_scheduler=chain), run(6, lr_scheduler=chain)
    rates = [each.optimizers[0].param_groups[0]["lr"] for each in (resumed, whole)]
    assert rates[0] == rates[1]


class Counting(torch.optim.Optimizer):
    """An optimizer of someone's that keeps a state among its settings."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step, and count."""
        loss = closure()
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss


def test_what_another_s_optimizer_keeps_among_its_settings_goes_on(tmp_path: Path):
    by = partial(Counting, lr=1e-3)
    run(3, optimizer=by).save_checkpoint(tmp_path / "3.ckpt")
    assert run(5, tmp_path / "3.ckpt", optimizer=by).optimizers[0].param_groups[0]["count"] == 5
