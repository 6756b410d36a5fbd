"""Loss terms against their formulas, and their gradients."""

import pytest
import torch
from torch.nn import functional

from lightning_sae.allocation import threshold_choice
from lightning_sae.losses import aux_k_loss, aux_zipf_loss, reconstruction_loss, sparsity_loss


def test_reconstruction_loss_is_the_mean_square():
    assert reconstruction_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]])) == 2.5


def test_sparsity_loss_is_the_l1_norm_per_token_and_dimension():
    matches = threshold_choice(torch.tensor([[1.0, 2.0, -5.0], [0.0, 3.0, 0.0]]), 0.0)
    assert sparsity_loss(matches, d_model=4) == 6 / 2 / 4


def dense_aux_k(affinities, error, dictionary, k_aux):
    """Gao et al. 2024, appendix A.2, spelled out on dense codes."""
    target = error.detach()
    top = functional.relu(affinities).topk(k_aux, dim=1)
    codes = torch.zeros_like(affinities).scatter(1, top.indices, top.values)
    variance = (target - target.mean(0)).pow(2).mean()
    directions = dictionary / dictionary.norm(dim=1, keepdim=True)
    return (target - codes @ directions).pow(2).mean() / variance


def test_aux_k_loss_is_its_formula_and_moves_encoder_and_decoder():
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((12, 9), (12, 4), (9, 4))
    ]
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours, reference = aux_k_loss(*inputs, 3), dense_aux_k(*copies, 3)
    torch.testing.assert_close(ours, reference)
    ours.backward()
    reference.backward()
    for tensor, copy in zip((inputs[0], inputs[2]), (copies[0], copies[2]), strict=True):
        assert copy.grad.abs().sum() > 0
        torch.testing.assert_close(tensor.grad, copy.grad)
    assert inputs[1].grad is None  # the residual is detached
    assert torch.autograd.gradcheck(
        lambda a, w: aux_k_loss(a, inputs[1], w, 3), (inputs[0], inputs[2])
    )


def test_aux_k_loss_uses_what_dead_features_there_are():
    error = torch.randn(12, 4)
    assert aux_k_loss(torch.zeros(12, 0), error, torch.zeros(0, 4), 3) == 0
    few = aux_k_loss(torch.ones(12, 1), error, torch.eye(4)[:1], 3)
    torch.testing.assert_close(few, dense_aux_k(torch.ones(12, 1), error, torch.eye(4)[:1], 1))


def test_aux_k_loss_of_a_perfect_reconstruction_is_zero():
    affinities = torch.ones(12, 2, requires_grad=True)
    loss = aux_k_loss(affinities, torch.zeros(12, 4), torch.eye(4)[:2], 1)
    loss.backward()
    assert loss == 0
    assert torch.equal(affinities.grad, torch.zeros(12, 2))


def dead_and_dying(dead, dying, seed=0):
    """Affinities, error and dictionary of a batch, and the deficits of the dying."""
    generator = torch.Generator().manual_seed(seed)
    affinities, error, dictionary = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((12, dead + dying), (12, 4), (dead + dying, 4))
    )
    deficits = 0.5 + 0.5 * torch.rand(dying, dtype=torch.float64, generator=generator)
    return affinities, error, dictionary, deficits


def test_aux_zipf_loss_without_a_threshold_is_exactly_aux_k_loss():
    ours, reference = dead_and_dying(9, 0), dead_and_dying(9, 0)
    zipf = aux_zipf_loss(*ours, k_aux=3, dying_below=0.0)
    aux_k = aux_k_loss(*reference[:3], 3)
    assert torch.equal(zipf, aux_k)
    zipf.backward()
    aux_k.backward()
    for tensor, copy in ((ours[0], reference[0]), (ours[2], reference[2])):
        assert torch.equal(tensor.grad, copy.grad)
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(("k_aux", "k_dying"), [(1, 1), (8, 1), (17, 2)])
def test_aux_zipf_loss_adds_the_losses_of_two_groups_with_weighted_codes(k_aux, k_dying):
    affinities, error, dictionary, deficits = dead_and_dying(20, 7)
    dead, dying = affinities[:, :20] * 0.4, affinities[:, 20:] * deficits
    expected = dense_aux_k(dead, error, dictionary[:20], k_aux) / 0.4**2
    expected = expected + dense_aux_k(dying, error, dictionary[20:], k_dying)
    loss = aux_zipf_loss(affinities, error, dictionary, deficits, k_aux=k_aux, dying_below=0.6)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(
        lambda a, w: aux_zipf_loss(a, error, w, deficits, k_aux=k_aux, dying_below=0.6),
        (affinities, dictionary),
    )


def test_aux_zipf_loss_moves_the_features_it_is_given_and_no_other():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator)
    weight, dictionary = (
        torch.randn(10, 4, generator=generator).requires_grad_() for _ in range(2)
    )
    bias = torch.zeros(10, requires_grad=True)
    affinities = functional.linear(x, weight, bias)
    error = x - affinities.relu() @ dictionary
    helped = torch.tensor([7, 2, 5])  # dead, dying, dying
    deficits = torch.tensor([0.9, 0.6])
    loss = aux_zipf_loss(
        affinities[:, helped], error, dictionary[helped], deficits, k_aux=4, dying_below=0.5
    )
    loss.backward()
    for parameter in (weight, bias, dictionary):
        moved = parameter.grad.reshape(10, -1).abs().sum(1) > 0
        assert moved.nonzero().squeeze(1).tolist() == [2, 5, 7]


def test_aux_zipf_loss_leaves_the_dead_their_slots_however_large_the_dying_are():
    alone, error, rows, none = dead_and_dying(9, 0)
    aux_zipf_loss(alone, error, rows, none, k_aux=3, dying_below=0.5).backward()
    crowded, _, more_rows, deficits = dead_and_dying(9, 7, seed=1)
    with torch.no_grad():
        crowded[:, :9], more_rows[:9] = alone, rows
        crowded[:, 9:] = 100.0
    aux_zipf_loss(crowded, error, more_rows, deficits, k_aux=3, dying_below=0.5).backward()
    torch.testing.assert_close(crowded.grad[:, :9], alone.grad)
    torch.testing.assert_close(more_rows.grad[:9], rows.grad)


def test_aux_zipf_loss_asks_the_dead_for_more_than_the_error():
    error, row = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1)
    for dying_below, enough in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0)):
        losses = [
            aux_zipf_loss(
                torch.tensor([[size], [-1.0]]),
                error,
                row,
                error[:0, 0],
                k_aux=1,
                dying_below=dying_below,
            )
            for size in (enough, 0.9 * enough, 1.1 * enough)
        ]
        assert losses[0] < min(losses[1:])


def test_aux_zipf_loss_does_not_move_features_without_a_deficit():
    affinities, error, dictionary, deficits = dead_and_dying(0, 7)
    loss = aux_zipf_loss(
        affinities, error, dictionary, torch.zeros_like(deficits), k_aux=8, dying_below=0.5
    )
    loss.backward()
    assert torch.equal(affinities.grad, torch.zeros_like(affinities))
    assert torch.equal(dictionary.grad, torch.zeros_like(dictionary))


def test_aux_zipf_loss_is_zero_if_no_feature_needs_help():
    assert aux_zipf_loss(*dead_and_dying(0, 0), k_aux=3, dying_below=0.5) == 0


@pytest.mark.parametrize("dying_below", [-0.1, 1.0, float("nan")])
def test_aux_zipf_loss_refuses_a_threshold_that_leaves_the_dead_no_weight(dying_below):
    with pytest.raises(ValueError, match=f"dying_below={dying_below} is"):
        aux_zipf_loss(*dead_and_dying(2, 1), k_aux=3, dying_below=dying_below)
