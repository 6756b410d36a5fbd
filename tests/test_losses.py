"""Loss terms against their formulas, and their gradients."""

import torch
from torch.nn import functional

from lightning_sae.allocation import threshold_choice
from lightning_sae.losses import aux_k_loss, reconstruction_loss, sparsity_loss


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
    return (target - codes @ dictionary).pow(2).mean() / variance


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
    assert aux_k_loss(torch.ones(12, 2), torch.zeros(12, 4), torch.eye(4)[:2], 1) == 0
