"""What a training step holds in tensors beside the weights and Adam's moments."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_sae import (
    ChunkedAdam,
    FeatureChoiceSAE,
    MutualChoiceSAE,
    SparseAutoencoder,
    TopKSAE,
)

TOKENS, D_MODEL, N_FEATURES, K = 1024, 256, 16384, 8
MIB = 2**20
ALL_PAIRS = TOKENS * N_FEATURES * 4
WEIGHTS = N_FEATURES * D_MODEL * 4  # of the encoder, or of the decoder

CASES: dict[str, Callable[..., SparseAutoencoder]] = {
    "topk": TopKSAE,
    "mutual": MutualChoiceSAE,
    "mutual by token_norm": partial(MutualChoiceSAE, importance="token_norm"),
    "feature": partial(FeatureChoiceSAE, mutual_choice_share=0),
    "feature, per batch": partial(FeatureChoiceSAE, mutual_choice_share=0, per_batch=True),
}


def held(compute: Callable[[], object]) -> int:
    """Return the most bytes in tensors, at any time, beyond those that are there already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = compute()
    # The public events have what each operation takes, but not when it is given back.
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most


def test_what_is_held_is_counted():
    def compute() -> None:
        for size in (2, 1, 3):
            _ = torch.ones(size * MIB) + torch.ones(size * MIB)  # 4 bytes each

    # The sum of three is made while that of one is there still.
    assert held(compute) == (3 + 3 + 3 + 1) * 4 * MIB


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_step_holds_neither_all_pairs_nor_a_gradient_of_all_weights(make):
    torch.manual_seed(0)
    sae = make(D_MODEL, N_FEATURES, K, aux_coefficient=0)
    optimizer = ChunkedAdam(sae.parameters())
    sae.leave_gradients_in_parts()
    directions = torch.randn(512, D_MODEL)
    losses = []

    def step() -> tuple[int, int]:
        x = torch.relu(torch.randn(TOKENS, 512) - 1.5) @ directions
        choosing = held(lambda: losses.append(sae.loss(x)[0]))

        def rest() -> None:
            losses.pop().backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            sae.normalize_decoder()

        return choosing, held(rest)

    step()  # which makes Adam's moments, and thresholds
    for _ in range(2):
        choosing, rest = step()
        assert choosing < 32 * MIB < ALL_PAIRS  # a tile of 24, and a few times the batch
        assert rest < 6 * MIB < WEIGHTS


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_auxiliary_losses_make_no_gradients_of_their_own(make):
    torch.manual_seed(0)
    sae = make(D_MODEL, N_FEATURES, K, dying_below=0.75)
    x = torch.randn(TOKENS, D_MODEL)
    sae.loss(x)
    sae.history.tokens_since_fired[::3] = sae.history.dead_after_tokens
    loss, stats = sae.loss(x)
    assert stats["aux_zipf_loss"] > 0
    # Gradients of two matrices, and the tables and matches that they are summed up from.
    assert held(loss.backward) < 2 * WEIGHTS + 12 * MIB < 3 * WEIGHTS


def test_parts_of_a_gradient_are_not_kept_where_they_are_larger_than_it():
    torch.manual_seed(0)
    sae = TopKSAE(64, 1024, K, multi_k_coefficient=0.1)
    x = torch.randn(8192, 64)
    sae.loss(x)
    sae.history.tokens_since_fired[::3] = sae.history.dead_after_tokens
    loss, _ = sae.loss(x)
    assert held(loss.backward) < 16 * MIB


def test_terms_of_a_loss_share_weights_of_sixteen_bits():
    """Each term that kept its own wider copy of a matrix would hold twice what that takes."""
    torch.manual_seed(0)
    sae = TopKSAE(D_MODEL, N_FEATURES, K, dying_below=0.75).bfloat16()
    x = torch.randn(TOKENS, D_MODEL)
    sae.loss(x)
    sae.history.tokens_since_fired[::3] = sae.history.dead_after_tokens
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, stats = sae.loss(x)
    assert stats["aux_zipf_loss"] > 0
    matrices = [tensor for tensor in kept if tensor.shape == (N_FEATURES, D_MODEL)]
    assert {tensor.data_ptr() for tensor in matrices} == {
        sae.encoder.weight.data_ptr(),
        sae.decoder.weight.data_ptr(),
    }
