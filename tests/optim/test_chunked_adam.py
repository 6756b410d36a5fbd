"""Adam in chunks takes the steps of Adam."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import (
    ChunkedAdam,
    MutualChoiceSAE,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.sparse import RowGradient, row_sums
from tests.helpers.superposition import superposition

D_MODEL, N_FEATURES = 8, 50

MAKE = {
    "standard": partial(StandardSAE, D_MODEL, N_FEATURES, 0.5),  # so many matches: dense products
    "topk": partial(TopKSAE, D_MODEL, N_FEATURES, 3, multi_k_coefficient=0.1),
    "mutual": partial(MutualChoiceSAE, D_MODEL, N_FEATURES, 3, dead_after_tokens=200),
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_sums, "_ROWS", 16)  # the last chunk is smaller


def train(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, batches: int = 2) -> Tensor:
    """Take 20 steps, each on some batches; return the losses."""
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        for batch in range(batches):
            loss, _ = sae.loss(superposition(64, D_MODEL, 32, seed=10 * step + batch).double())
            loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_steps_are_those_of_adam(make):
    results = []
    for kind in (partial(torch.optim.Adam, fused=True), ChunkedAdam):
        torch.manual_seed(0)
        sae = make().double()
        sae.leave_gradients_in_parts(kind is ChunkedAdam)
        optimizer = kind(sae.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=1e-3)
        losses = train(sae, optimizer)
        results.append((losses, sae.state_dict(), optimizer.state_dict()["state"]))
    (losses, weights, state), (found_losses, found_weights, found_state) = results
    torch.testing.assert_close(found_losses, losses)
    torch.testing.assert_close(found_weights, weights)
    torch.testing.assert_close(found_state, state)


def test_other_parameters_are_stepped_too():
    results = []
    for kind in (torch.optim.Adam, ChunkedAdam):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = kind(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        results.append(layer.state_dict())
    torch.testing.assert_close(results[0], results[1])


def penalised(sae: SparseAutoencoder, loss: Tensor) -> None:
    (loss + 1e-2 * sae.encoder.weight.square().sum() + 1e-2 * sae.W_dec.sum()).backward()


def forgetful(sae: SparseAutoencoder, loss: Tensor) -> None:
    sae.zero_grad(set_to_none=False)
    loss.backward()


def curious(sae: SparseAutoencoder, loss: Tensor) -> None:
    torch.autograd.grad(loss, sae.b_dec, retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backward", [penalised, forgetful, curious])
def test_steps_are_those_of_adam_in_other_loops(backward, frozen: bool):
    weights = []
    for kind in (partial(torch.optim.Adam, fused=True), ChunkedAdam):
        torch.manual_seed(0)
        sae = MAKE["mutual"]().double()
        sae.W_dec.requires_grad_(not frozen)
        sae.leave_gradients_in_parts(kind is ChunkedAdam)
        optimizer = kind(sae.parameters(), lr=1e-2)
        for step in range(5):
            loss, _ = sae.loss(superposition(64, D_MODEL, 32, seed=step).double())
            optimizer.zero_grad(set_to_none=False)
            backward(sae, loss)
            optimizer.step()
        weights.append(sae.state_dict())
    torch.testing.assert_close(weights[1], weights[0])


def test_a_copy_steps_too():
    layer = nn.Linear(3, 2)
    optimizer = copy.deepcopy(ChunkedAdam(layer.parameters()))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(optimizer.param_groups[0]["params"][0], layer.weight)


def test_without_gradients_there_is_nothing_to_step():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    ChunkedAdam(layer.parameters()).step()
    assert torch.equal(layer.weight, before)


def test_a_gradient_scaler_is_refused():
    layer, scaler = nn.Linear(3, 2), torch.amp.GradScaler("cpu")
    optimizer = ChunkedAdam(layer.parameters())
    scaler.scale(layer(torch.ones(4, 3)).sum()).backward()
    with pytest.raises(ValueError, match="takes no GradScaler"):
        scaler.step(optimizer)


def fit(folder: Path, optimizer, **settings) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, 3, optimizer=optimizer)
    data = TensorDataset(superposition(640, D_MODEL, 32, seed=0))
    trainer = pl.Trainer(
        max_steps=10,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    loader = DataLoader(data, batch_size=64)
    trainer.fit(sae, loader, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    ],
)
def test_a_trainer_trains_the_same_with_it(tmp_path: Path, clip: dict):
    settings = clip | {"accumulate_grad_batches": 2}
    adam = fit(tmp_path / "adam", partial(torch.optim.Adam, lr=1e-2, fused=True), **settings)
    ours = fit(tmp_path / "ours", partial(ChunkedAdam, lr=1e-2), **settings)
    torch.testing.assert_close(ours["state_dict"], adam["state_dict"], rtol=1e-5, atol=1e-6)
    state, expected = (each["optimizer_states"][0]["state"] for each in (ours, adam))
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def test_a_trainer_leaves_gradients_in_parts_for_it_alone():
    sae = TopKSAE(D_MODEL, 300, 3, optimizer=ChunkedAdam)
    sae._trainer = SimpleNamespace(world_size=1, precision="32", estimated_stepping_batches=4)
    x = superposition(64, D_MODEL, 32, seed=0)
    for optimizer, kind in ((ChunkedAdam, RowGradient), (torch.optim.Adam, Tensor)):
        sae._optimizer = optimizer
        sae.configure_optimizers()
        sae.zero_grad()
        sae.loss(x)[0].backward()
        assert type(sae.decoder.weight.grad) is kind


def test_it_says_what_it_is_not_for():
    sae = TopKSAE(D_MODEL, N_FEATURES, 3, optimizer=ChunkedAdam)
    sae._trainer = SimpleNamespace(world_size=2, precision="32-true")
    with pytest.raises(ValueError, match="optimizer=ChunkedAdam is for one device"):
        sae.configure_optimizers()
