"""Training with features shared out over processes is training with all of them on one."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from lightning_sae import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    MutualChoiceTranscoder,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.callbacks import FiniteWeights
from lightning_sae.callbacks.resampling import renew
from lightning_sae.metrics import FeatureDensity
from lightning_sae.parallel import local
from lightning_sae.parallel.ranks import processes
from tests.helpers.ddp import run_on
from tests.helpers.superposition import superposition

STEPS, TOKENS, FEATURES = 40, 128, 49  # features that two processes cannot share equally

# By affinity unless they say otherwise: by token_norm zero tokens of this data tie, and rounding,
# which depends on the shape of a product, would decide which of them come first.
CASES: dict[str, Callable[[], SparseAutoencoder]] = {
    "topk": lambda: TopKSAE(8, FEATURES, 3, multi_k_coefficient=0.1, dead_after_tokens=TOKENS),
    "mutual": lambda: MutualChoiceSAE(
        8, FEATURES, 3, dead_after_tokens=2 * TOKENS, importance="affinity"
    ),
    "mutual by token norm": lambda: MutualChoiceSAE(8, FEATURES, 3, importance="token_norm"),
    "mutual by gain": lambda: MutualChoiceSAE(8, FEATURES, 3, importance="gain"),
    "feature, from the start": lambda: FeatureChoiceSAE(
        8,
        FEATURES,
        3,
        mutual_choice_share=0,
        min_matches=0.1,
        dead_after_tokens=TOKENS,
        importance="affinity",
    ),
    "feature, both phases": lambda: FeatureChoiceSAE(
        8,
        FEATURES,
        3,
        mutual_choice_tokens=30 * TOKENS,
        dead_after_tokens=2 * TOKENS,
        importance="affinity",
    ),
    "jumprelu": lambda: JumpReLUSAE(8, FEATURES, 3, bandwidth=0.1, aux_coefficient=0.1),
    "jumprelu, all losses": lambda: JumpReLUSAE(
        8, FEATURES, 3, bandwidth=0.5, penalty="tanh", pre_act_coefficient=0.1
    ),
    "gated": lambda: GatedSAE(8, FEATURES, 3),
    "mutual, nested": lambda: MutualChoiceSAE(8, FEATURES, 3, prefixes=[4, 16, 30]),
    "transcoder": lambda: MutualChoiceTranscoder(5, FEATURES, k=3, d_target=3, skip=True),
    "standard": lambda: StandardSAE(8, FEATURES, 0.5, l1_warmup_tokens=20 * TOKENS),
}


@contextlib.contextmanager
def shared_out(sae: SparseAutoencoder, groups: int = 1) -> Iterator[None]:
    """Do what a Trainer with Lightning's ModelParallelStrategy does, if there are processes."""
    count = processes()[1]
    if count > 1:
        names = ("data_parallel", "tensor_parallel")
        sae._device_mesh = init_device_mesh("cpu", (groups, count // groups), mesh_dim_names=names)
    sae.configure_model()
    sae.on_fit_start()
    yield


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def train(
    process: int, case: str, groups: int = 1
) -> tuple[list[dict[str, float]], list[float], dict[str, Tensor]]:
    """Return the loss and the gradient's norm of every step, and the SAE at the end, calibrated.

    In float64, so that only a different choice can show: sums in another order cannot.

    Args:
        process: Number of this process. Those after the first group start from other weights,
            which are not to show.
        case: Which SAE.
        groups: Groups of processes that each share out all features, and have different tokens.
    """
    torch.manual_seed(0 if process < processes()[1] // groups else 1)
    sae = CASES[case]().double()
    losses, norms = [], []
    with shared_out(sae, groups):
        ranks = sae.layout.ranks
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        for step in range(STEPS):
            x = superposition(TOKENS, 8, n_features=16, seed=step).double()
            loss, stats = sae.loss(x.chunk(ranks.size)[ranks.index])
            optimizer.zero_grad()
            loss.backward()
            sae.on_after_backward()
            norms.append(full(clip_grad_norm_(sae.parameters(), 0.05)).item())
            optimizer.step()
            sae.normalize_decoder()
            terms = {name: value for name, value in stats.items() if name.endswith("loss")}
            losses.append({name: ranks.mean(value).item() for name, value in terms.items()})
        held_out = superposition(400, 8, n_features=16, seed=STEPS).double()
        if hasattr(sae, "calibrate"):
            sae.calibrate(held_out.chunk(ranks.size)[ranks.index])
        state = {name: full(value) for name, value in sae.state_dict().items()}
        codes = sae.eval().encode(held_out).detach()
        return (
            losses,
            norms,
            state | {"codes": codes, "decoded": sae.decode(codes, like=held_out).detach()},
        )


def assert_equal_training(case: str, count: int, *args: Any) -> None:
    expected_losses, expected_norms, expected = train(0, case)
    for losses, norms, found in run_on(count, train, case, *args):
        for step, terms in enumerate(expected_losses):
            assert losses[step] == pytest.approx(terms, rel=1e-9)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-9, atol=0)
        for name, value in expected.items():
            # Buffers are float32, where a value between two of them may be rounded either way.
            exact = not value.is_floating_point()
            tolerance = 0 if exact else 1e-9 if value.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_processes_train_as_one_would(case: str):
    assert_equal_training(case, 2)


@pytest.mark.parametrize("case", ["mutual", "feature, both phases", "standard"])
def test_groups_with_different_tokens_train_as_one_process_would(case: str):
    assert_equal_training(case, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_four_processes_train_as_one_would(case: str, groups: int):
    assert_equal_training(case, 4, groups)


def spoil(rank: int) -> list[str]:
    """Return what is said where one process has a weight that is not a number."""
    sae = TopKSAE(8, FEATURES, 3)
    said = []
    with shared_out(sae):
        if rank == 1:
            local(sae.encoder.weight).data[0, 0] = torch.nan
        for act in (
            lambda: sae.loss(superposition(TOKENS, 8, n_features=16, seed=0)),
            lambda: FiniteWeights().on_save_checkpoint(pl.Trainer(logger=False), sae, {}),
        ):
            with pytest.raises(ValueError, match=r"finite|NaN") as caught:
                act()
            said.append(str(caught.value))
    return said


def test_all_processes_notice_what_breaks_on_one():
    said, same = run_on(2, spoil)
    assert said == same
    assert "affinities are not finite" in said[0]
    assert "encoder.weight has NaN or Inf" in said[1]


def resample(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sae = StandardSAE(8, FEATURES)
    with shared_out(sae):
        optimizer = torch.optim.Adam(sae.parameters())
        loss, _ = sae.loss(superposition(TOKENS, 8, n_features=16, seed=0))
        loss.backward()
        optimizer.step()
        dead = torch.tensor([40, 3, 24, 25])
        sae.history.tokens_since_fired[dead] = sae.history.dead_after_tokens
        renew(sae, dead, superposition(4, 8, n_features=16, seed=1), [optimizer])
        moments = optimizer.state[sae.W_dec]["exp_avg"]
        return {name: full(value) for name, value in sae.state_dict().items()} | {
            "moments": full(moments)
        }


def test_dead_features_are_resampled_where_they_are():
    expected = resample(0)
    for found in run_on(2, resample):
        torch.testing.assert_close(found, expected)


def copied(process: int) -> None:
    sae = MutualChoiceSAE(8, FEATURES, 3)
    x = superposition(TOKENS, 8, n_features=16, seed=0)
    with shared_out(sae):
        sae.loss(x)
        again = copy.deepcopy(sae)
        torch.testing.assert_close(again.encode(x), sae.encode(x))
        torch.testing.assert_close(again.loss(x)[0], sae.loss(x)[0])


def test_copies_have_the_same_share():
    run_on(2, copied)


def count_tokens(process: int) -> int:
    sae = TopKSAE(8, FEATURES, 3)
    with shared_out(sae):
        density = FeatureDensity(FEATURES, process_group=sae.layout.ranks.group)
        density.update(sae.match(superposition(TOKENS, 8, n_features=16, seed=0)))
        density.sync()
        return int(density.tokens)


def test_metrics_count_a_token_once():
    assert run_on(2, count_tokens) == [TOKENS, TOKENS]


def refuse(process: int) -> None:
    one_feature = TopKSAE(8, 1, 1)
    with (
        pytest.raises(ValueError, match="n_features=1 cannot be shared out over 2 devices"),
        shared_out(one_feature),
    ):
        pass


def test_more_processes_than_features_are_refused():
    run_on(2, refuse)
