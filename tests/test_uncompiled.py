"""`torch.compile` around an SAE, in evaluation and in training, alone and as a part of a module."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lightning_sae import MutualChoiceSAE
from lightning_sae.uncompiled import uncompiled
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations, every_architecture

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # dynamo looks at a loss's
)


@pytest.fixture(autouse=True)
def _afresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_method_is_called_as_it_is_and_what_is_around_it_is_compiled():
    seen = []

    @uncompiled
    def method(x: torch.Tensor) -> torch.Tensor:
        """Say so."""
        seen.append(torch.compiler.is_compiling())
        return x[x > 0]

    assert method.__doc__ == "Say so."
    around = torch.compile(lambda x: method(x + 1) * 2, backend="eager")
    assert around(torch.tensor([-3.0, 1.0])).tolist() == [4.0]
    assert seen == [False]
    assert graphs() == 2


@every_architecture
def test_a_compiled_sae_gives_what_it_gives_without(make):
    sae = make()
    for _ in range(2):
        sae.loss(activations())
    compiled = torch.compile(sae.eval(), backend="eager")
    with torch.no_grad():
        for tokens in (64, 17, 1):
            x = activations(tokens)
            assert torch.equal(compiled(x), sae(x))
            assert torch.equal(compiled.encode(x), sae.encode(x))
    assert graphs() == 0  # it took 41, and as many again for other numbers of tokens


def weights_after_fit(sae: pl.LightningModule, compiled: bool) -> dict[str, torch.Tensor]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(activations(512), batch_size=128)
    trainer.fit(torch.compile(sae, backend="eager") if compiled else sae, loader)
    return sae.state_dict()


@every_architecture
def test_a_compiled_sae_trains_as_it_does_without(make):
    sae = make()
    expected = weights_after_fit(copy.deepcopy(sae), compiled=False)
    found = weights_after_fit(sae, compiled=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert graphs() == 0


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(D_MODEL, D_MODEL)
        self.sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss, _ = self.sae.loss(self.before(x))
        return loss * 2 + self.sae.W_dec.square().mean()


def test_what_is_around_an_sae_is_compiled_and_gradients_are_the_same():
    host = Host()
    x = activations()
    other = copy.deepcopy(host)
    other(x).backward()
    torch.compile(host, backend="aot_eager")(x).backward()
    assert graphs() == 2
    for parameter, same in zip(host.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad)
