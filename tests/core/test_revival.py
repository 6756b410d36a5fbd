"""The auxiliary loss against its formulas, and its gradients."""

import copy
import math

import pytest
import torch
from torch.nn import functional

from lightning_sae import MutualChoiceSAE, TopKSAE
from lightning_sae.allocation import token_choice
from lightning_sae.core.revival import aux_k_loss, aux_zipf_loss
from lightning_sae.sparse import sum_directions
from tests.helpers.architectures import (
    D_MODEL,
    N_FEATURES,
    K,
    activations,
    affinities,
    chosen,
    every_architecture,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense_aux_k(affinities, error, dictionary, k_aux):
    """Gao et al. 2024, appendix A.2, spelled out on dense codes."""
    target = error.detach()
    top = functional.relu(affinities).topk(k_aux, dim=1)
    codes = torch.zeros_like(affinities).scatter(1, top.indices, top.values)
    variance = (target - target.mean(0)).pow(2).mean()
    directions = dictionary / dictionary.norm(dim=1, keepdim=True)
    return (target - codes @ directions).pow(2).mean() / variance


def helped(features, seed=0):
    """Affinities, error and dictionary of a batch, as functions of which losses have gradients."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((12, features), (12, 4), (features, 4))
    )


def model(affinities, dictionary, k):
    return sum_directions(token_choice(affinities, k), dictionary)


def test_aux_k_loss_is_its_formula_and_moves_encoder_and_decoder():
    inputs, copies = helped(9), helped(9)
    ours = aux_k_loss(inputs[1], model(inputs[0], inputs[2], 3))
    reference = dense_aux_k(*copies, 3)
    torch.testing.assert_close(ours, reference)
    ours.backward()
    reference.backward()
    for ours, theirs in zip((inputs[0], inputs[2]), (copies[0], copies[2]), strict=True):
        assert theirs.grad.abs().sum() > 0
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert inputs[1].grad is None  # the residual is detached
    assert torch.autograd.gradcheck(
        lambda a, w: aux_k_loss(inputs[1], model(a, w, 3)), (inputs[0], inputs[2])
    )


def test_aux_k_loss_of_a_perfect_reconstruction_is_zero():
    modelled = torch.ones(12, 4, requires_grad=True)
    loss = aux_k_loss(torch.zeros(12, 4), modelled)
    loss.backward()
    assert loss == 0
    assert torch.equal(modelled.grad, torch.zeros(12, 4))


def test_aux_zipf_loss_without_a_threshold_is_exactly_aux_k_loss():
    affinities, error, dictionary = helped(9)
    by_dead = model(affinities, dictionary, 3)
    assert torch.equal(aux_zipf_loss(error, by_dead, None, 0.0), aux_k_loss(error, by_dead))


def test_aux_zipf_loss_adds_the_losses_of_two_groups():
    dead, error, dead_rows = helped(20)
    dying, _, dying_rows = helped(7, seed=1)
    expected = dense_aux_k(dead * 0.4, error, dead_rows, 8) / 0.4**2
    expected = expected + dense_aux_k(dying, error, dying_rows, 2)

    def loss(dead, dead_rows, dying, dying_rows):
        by_dead, by_dying = model(dead, dead_rows, 8), model(dying, dying_rows, 2)
        return aux_zipf_loss(error, by_dead, by_dying, dying_below=0.6)

    torch.testing.assert_close(loss(dead, dead_rows, dying, dying_rows), expected)
    assert torch.autograd.gradcheck(loss, (dead, dead_rows, dying, dying_rows))


def test_aux_zipf_loss_asks_the_dead_for_more_than_the_error():
    error = torch.tensor([[1.0], [-1.0]])
    for dying_below, enough in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0)):
        losses = [
            aux_zipf_loss(error, size * error.relu(), None, dying_below)
            for size in (enough, 0.9 * enough, 1.1 * enough)
        ]
        assert losses[0] < min(losses[1:])


def test_aux_zipf_loss_is_zero_if_no_feature_needs_help():
    assert aux_zipf_loss(torch.randn(12, 4), None, None, dying_below=0.5) == 0


@pytest.mark.parametrize("dying_below", [-0.1, 1.0, float("nan")])
def test_aux_zipf_loss_refuses_a_threshold_that_leaves_the_dead_no_weight(dying_below):
    with pytest.raises(ValueError, match=f"dying_below={dying_below} is"):
        aux_zipf_loss(torch.randn(12, 4), torch.randn(12, 4), None, dying_below=dying_below)


@every_architecture
@pytest.mark.parametrize("every", [1, 3])
def test_dying_features_are_helped_by_their_deficit(make, every):
    """The aux loss, written out with dense codes, has the same value and gradients."""
    help_them = {"dying_below": 0.5, "aux_coefficient": 1 / 32, "aux_every": every}
    sae = make(dead_after_tokens=10**6, **help_them).double()
    x = activations().double()
    sae.loss(x)
    # Densities along a law but for five features, two of which are dead.
    sae.history.density = (0.4 / (torch.arange(N_FEATURES) + 2.0)).float()
    sae.history.density[[10, 20, 30]] *= torch.tensor([0.1, 0.15, 0.7])
    sae.history.density[[40, 41]] = 0
    sae.history.tokens_since_fired[[40, 41]] = 10**6
    sae.history.tokens_seen.fill_(10**6)
    sae.revival.loss(sae, sae.history, x, x)  # which fits the law
    deficit, dead = sae.revival.deficit(sae.history), sae.history.dead()
    dying = (deficit > 0.5) & ~dead
    assert {10, 20} <= set(dying.nonzero().flatten().tolist())
    assert not dying[30]
    reference = copy.deepcopy(sae)

    scaled = sae.scaled(x)
    matches = chosen(sae, x)
    error = scaled - sae.reconstruct(matches)
    loss = sae.extra_losses(scaled, matches, error)["aux_zipf_loss"]
    loss.backward()

    z = affinities(reference, scaled[::every])
    dictionary = reference.W_dec / reference.W_dec.norm(dim=1, keepdim=True)
    target = error[::every].detach()
    total = torch.zeros((), dtype=torch.float64)
    for members, weight, places, part in ((dead, dead, 8, 2), (dying, deficit, 1, 1)):
        weighted = (z * weight)[:, members].relu()
        top = weighted.topk(min(places, int(members.sum())), dim=1)
        codes = torch.zeros_like(weighted).scatter(1, top.indices, top.values)
        left = (part * target - codes @ dictionary[members]).pow(2).mean()
        filled = min(1, int(members.sum()) / places)
        total = total + filled * left / (target - target.mean(0)).pow(2).mean()
    (total / 32).backward()
    torch.testing.assert_close(loss, total / 32)
    for name, _ in sae.named_parameters():
        ours, theirs = sae.get_parameter(name).grad, reference.get_parameter(name).grad
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_dying_below_is_a_share(share: float):
    with pytest.raises(ValueError, match=r"dying_below=.* must be a share, 0 to less than 1"):
        TopKSAE(D_MODEL, N_FEATURES, K, dying_below=share)


def measured(dead_after_tokens: int = 1600) -> MutualChoiceSAE:
    """Return an SAE whose densities follow a law, but for one feature, after too few tokens."""
    sae = MutualChoiceSAE(
        D_MODEL, N_FEATURES, K, dying_below=0.75, dead_after_tokens=dead_after_tokens
    )
    sae.loss(activations())
    sae.encoder.bias.data[-1] = -1e3  # it cannot fire
    sae.history.density.copy_(0.5 / (torch.arange(N_FEATURES) + 3.0))
    sae.history.density[-1] = 0
    sae.history.tokens_seen.fill_(dead_after_tokens - 1)
    return sae


def test_nothing_falls_short_before_densities_mean_anything():
    sae = measured()
    sae.loss(activations())
    assert not sae.revival.deficit(sae.history).any()
    assert sae.revival.fitted_at == -1
    sae.loss(activations())
    assert sae.revival.deficit(sae.history)[-1] > 0.9


def test_the_law_is_fitted_so_many_times_a_window():
    sae = measured()
    fits = set()
    for _ in range(26):  # of 64 tokens: more than one window of 1600
        sae.loss(activations())
        fits.add(int(sae.revival.fitted_at))
    first = 1600 - 1 + 64
    assert fits == {-1, *(first + 256 * fit for fit in range(7))}  # 200 tokens are four batches


def test_a_law_that_no_longer_fits_is_none():
    sae = measured()
    for _ in range(2):
        sae.loss(activations())
    assert sae.revival.law.isfinite().all()
    sae.history.density.zero_()
    sae.history.tokens_seen.add_(1600)
    sae.loss(activations())
    assert (sae.revival.law == 0).all()
    assert not sae.revival.deficit(sae.history).any()


def test_a_law_is_part_of_the_state_and_one_that_is_missing_is_fitted_anew():
    sae = measured()
    for _ in range(3):
        sae.loss(activations())
    state = sae.state_dict()
    assert {"revival.law", "revival.fitted_at"} <= state.keys()
    same, earlier = copy.deepcopy(sae), copy.deepcopy(sae)
    same.load_state_dict(state)
    assert torch.equal(same.revival.law, sae.revival.law)
    earlier.load_state_dict({name: t for name, t in state.items() if "revival" not in name})
    assert earlier.revival.fitted_at == -1
    earlier.loss(activations())
    assert earlier.revival.fitted_at == state["history.tokens_seen"]
    without = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
    without.load_state_dict(state)  # where only dead features are helped, there is none
    assert not [name for name in without.state_dict() if "revival" in name]
