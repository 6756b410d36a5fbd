"""Training on several processes is training on one with all their tokens."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_sae import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    MutualChoiceTranscoder,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
    load,
)
from lightning_sae.architectures.threshold import Scope
from lightning_sae.parallel import Ranks
from tests.helpers.ddp import run_on
from tests.helpers.superposition import superposition

STEPS, TOKENS = 100, 128
RANKS = Ranks()

# By affinity unless they say otherwise: by token_norm zero tokens of this data tie, and rounding,
# which depends on the shape of a product, would decide which of them come first.
CASES: dict[str, Callable[[], SparseAutoencoder]] = {
    "topk": lambda: TopKSAE(8, 48, 3, multi_k_coefficient=0.1, aux_coefficient=0),
    "mutual": lambda: MutualChoiceSAE(8, 48, 3, aux_coefficient=0, importance="affinity"),
    "mutual by gain": lambda: MutualChoiceSAE(8, 48, 3, importance="gain", aux_coefficient=0),
    "feature, uniform": lambda: FeatureChoiceSAE(
        *(8, 48, 3),
        budgets="uniform",
        per_batch=True,
        mutual_choice_share=0,
        aux_coefficient=0,
        importance="affinity",
    ),
    "feature, zipf": lambda: FeatureChoiceSAE(
        8, 48, 3, mutual_choice_share=0, min_matches=0.1, aux_coefficient=0, importance="affinity"
    ),
    "feature, both phases": lambda: FeatureChoiceSAE(
        8, 48, 3, mutual_choice_tokens=60 * TOKENS, aux_coefficient=0, importance="affinity"
    ),
    "jumprelu": lambda: JumpReLUSAE(8, 48, 3, bandwidth=0.1, pre_act_coefficient=0.1),
    "gated": lambda: GatedSAE(8, 48, 3),
    "mutual, nested": lambda: MutualChoiceSAE(8, 48, 3, prefixes=[4, 16], aux_coefficient=0),
    "transcoder": lambda: MutualChoiceTranscoder(
        5, 48, k=3, d_target=3, skip=True, aux_coefficient=0
    ),
    "standard": lambda: StandardSAE(8, 48, 0.5, l1_warmup_tokens=50 * TOKENS),
    "mutual, helping dead and dying": lambda: MutualChoiceSAE(
        8, 48, 3, dead_after_tokens=2 * TOKENS, dying_below=0.75, importance="affinity"
    ),
    "mutual, on ordinary tokens": lambda: MutualChoiceSAE(
        8, 48, 3, dead_after_tokens=2 * TOKENS, importance="affinity", max_norm_multiple=1.3
    ),
    "mutual, helping them by some tokens": lambda: MutualChoiceSAE(
        8, 48, 3, dead_after_tokens=2 * TOKENS, dying_below=0.75, aux_every=4, importance="affinity"
    ),
}


class Loss(nn.Module):
    """What DistributedDataParallel wants: a module whose forward gives what gradients are of."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        loss, self.stats = self.sae.loss(x)
        return loss


def train(rank: int, case: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Return what this rank would log of every step, and the SAE at the end, calibrated.

    In float64, so that only a different choice can show: sums in another order cannot.
    """
    torch.manual_seed(0)
    sae = CASES[case]().double()
    with_loss = Loss(sae)
    model = DistributedDataParallel(with_loss) if RANKS.size > 1 else with_loss
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    logged = []
    for step in range(STEPS):
        batch = superposition(TOKENS, 8, n_features=16, seed=step).double()
        loss = model(batch.chunk(RANKS.size)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        logged.append({name: value.item() for name, value in with_loss.stats.items()})
        # DDP makes buffers equal again before the next step, but until then it would show.
        buffers = torch.cat([buffer.flatten().double() for buffer in sae.buffers()])
        assert torch.equal(RANKS.all_reduce(buffers, "max"), RANKS.all_reduce(buffers, "min")), (
            f"step {step}"
        )
    if hasattr(sae, "calibrate"):
        held_out = superposition(400, 8, n_features=16, seed=STEPS).double()
        sae.calibrate(held_out.tensor_split([100, 300, 300][: RANKS.size - 1])[rank])
    return logged, sae.state_dict()


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *((case, 2) for case in CASES),
        ("feature, both phases", 4),
    ],
)
def test_ranks_train_as_one_would(case: str, ranks: int):
    expected_curves, expected = train(0, case)
    for curves, found in run_on(ranks, train, case):
        for step, figures in enumerate(curves):  # but for losses and fvu they are float32
            exact = {name for name in figures if "loss" in name or name == "fvu"}
            for name, value in expected_curves[step].items():
                tolerance = 1e-9 if name in exact else 1e-6
                torch.testing.assert_close(
                    figures[name], value, rtol=tolerance, atol=tolerance, msg=f"{name}, step {step}"
                )
        for name, value in expected.items():
            # Buffers are float32, where a value between two of them may be rounded either way.
            exact = not value.is_floating_point()
            tolerance = 0 if exact else 1e-9 if value.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def gradients(rank: int, cuts: list[int], case: str) -> list[Tensor]:
    """Return the mean over ranks of the gradients of one batch, which is shared out as told."""
    torch.manual_seed(0)
    sae = CASES[case]().double()
    for step in range(4):  # some features are dead by the last
        sae.zero_grad()
        batch = superposition(TOKENS, 8, n_features=16, seed=step).double()
        sae.loss(batch.split(cuts)[rank])[0].backward()
    return [RANKS.mean(parameter.grad) for parameter in sae.parameters()]


@pytest.mark.parametrize("cuts", [[100, 28], [0, 128]])
@pytest.mark.parametrize("case", ["standard", "topk", "mutual, helping dead and dying"])
def test_each_token_counts_alike_however_many_a_rank_has(case: str, cuts: list[int]):
    expected = gradients(0, [TOKENS], case)
    for found in run_on(2, gradients, cuts, case):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def choose_locally(rank: int) -> tuple[float, ...]:
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 24, 3, scope="local")
    x = superposition(128, 8, n_features=16, seed=0) * (1 + torch.arange(128)).unsqueeze(1)
    _, stats = sae.loss(x.chunk(2)[rank])
    return stats["l0"].item(), stats["fvu"].item(), sae.threshold.item()


def test_ranks_may_have_a_budget_each():
    one, other = run_on(2, choose_locally)
    assert one == other
    assert one[0] == 3


def with_all_tokens_here(rank: int, scope: Scope) -> dict[str, Tensor]:
    """Return what is logged of the last of three batches, all of whose tokens are on rank 0."""
    torch.manual_seed(0)
    sae = MutualChoiceSAE(8, 48, 3, scope=scope, dead_after_tokens=TOKENS, dying_below=0.75)
    for step in range(3):
        x = superposition(TOKENS, 8, n_features=16, seed=step)
        loss, stats = sae.loss(x[: TOKENS if rank == 0 else 0])
        loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in sae.parameters())
    return stats


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_rank_may_have_no_tokens(scope: Scope):
    expected = with_all_tokens_here(0, scope)
    assert expected["aux_zipf_loss"] > 0
    for found in run_on(2, with_all_tokens_here, scope):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("architecture", [MutualChoiceSAE, FeatureChoiceSAE])
def test_a_scope_is_global_or_local(architecture: type):
    with pytest.raises(ValueError, match="scope='rank' is none of global, local"):
        architecture(8, 24, 3, scope="rank")


SETTINGS = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": "4",
    "trainer.val_check_interval": "4",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "model.n_features": "512",
    "data.batch_size": "512",
    "data.batches_per_block": "4",
    "data.validation_tokens": "1024",
}


def fit(folder: Path, config: str, *overlays: str) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "lightning_sae", "fit", "--config", config]
    for overlay in overlays:
        command += ["--config", overlay]
    command += [f"--{key}={value}" for key, value in SETTINGS.items()]
    run = subprocess.run(  # noqa: S603 - our own program
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (checkpoint,) = folder.rglob("last.ckpt")
    return torch.load(checkpoint, weights_only=True)


def test_the_command_line_trains_the_same_on_two_processes(tmp_path: Path):
    one = fit(tmp_path / "one", "mutual_choice.yaml")
    two = fit(tmp_path / "two", "mutual_choice.yaml", "trainer/ddp.yaml")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert two["state_dict"]["history.tokens_seen"] == 4 * 512
    for folder in tmp_path.iterdir():
        (pretrained,) = folder.rglob("pretrained")
        assert load(pretrained).tokens_seen == 4 * 512
