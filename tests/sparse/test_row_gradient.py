"""Gradients in parts: to everybody but those who know, the tensors that autograd would make."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_sae.allocation import threshold_choice
from lightning_sae.sparse import (
    GradientForm,
    RowGradient,
    matched_affinities,
    row_sums,
    rows,
    sum_directions,
)

FEATURES, WIDTH, TOKENS = 7, 3, 5


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(row_sums, "_ROWS", 3)  # several chunks, the last one smaller
    monkeypatch.setattr(rows, "DENSE_ABOVE", 1.0)  # else so small matrices go another way


@pytest.fixture
def inputs() -> list[Tensor]:
    shapes = (FEATURES, WIDTH), (FEATURES, WIDTH), (TOKENS, WIDTH)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loss_of(weight: Tensor, dictionary: Tensor, x: Tensor, in_parts: bool = True) -> Tensor:
    """A loss that reads two matrices sparsely, one of them twice."""
    zeros, bias = x.new_zeros(WIDTH), x.new_zeros(FEATURES)
    matches = threshold_choice((x @ weight.to(x).T).detach(), 0.1)
    values = matched_affinities(x, zeros, weight, bias, matches, in_parts=in_parts)
    all_of_them = sum_directions(matches.with_values(values), dictionary, in_parts=in_parts)
    few = matches.select(torch.arange(len(matches) // 2))
    ones = few.with_values(torch.ones_like(few.value))
    half = sum_directions(ones, dictionary, in_parts=in_parts)
    return (all_of_them.square() * half.cos()).sum()


def whole(*inputs: Tensor) -> Tensor:
    return loss_of(*inputs, in_parts=False)


def gradient_of(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*inputs), inputs))


def parts_and_whole(inputs: list[Tensor]) -> tuple[RowGradient, Tensor]:
    """Return the dictionary's gradient in parts, and as autograd adds it up."""
    found, expected = gradient_of(loss_of, inputs)[1], gradient_of(whole, inputs)[1]
    assert isinstance(found, RowGradient)
    assert found.in_parts
    assert len(found.content.parts) == 2  # one a term
    return found, expected


def test_gradients_are_those_of_autograd(inputs):
    assert torch.autograd.gradcheck(whole, inputs)
    torch.testing.assert_close(
        [each + 0 for each in gradient_of(loss_of, inputs)], gradient_of(whole, inputs)
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g + g,
        lambda g: g * 0.5,
        lambda g: g * torch.tensor(0.5),
        lambda g: g.clone().mul_(3.0),
        lambda g: g.clone().add_(g),
        lambda g: g.detach(),
        lambda g: g.view_as(g),
        lambda g: g.to(torch.float32),
        lambda g: g.clone().zero_(),
    ],
    ids=["add", "mul", "mul by 0-d", "mul_", "add_", "detach", "view", "to", "zero_"],
)
def test_these_operations_keep_parts(inputs, operation: Callable[[Tensor], Tensor]):
    found, expected = parts_and_whole(inputs)
    result = operation(found)
    assert isinstance(result, RowGradient)
    assert result.in_parts
    chunks = torch.cat([rows for _, rows in result.chunks()])
    torch.testing.assert_close(chunks, operation(expected))
    torch.testing.assert_close(result.form(), operation(expected))
    torch.testing.assert_close(found.form(), expected)  # unchanged


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g + 1,
        lambda g: 1 - g,
        lambda g: g @ g.T,
        lambda g: g[2:5] + 0,
        lambda g: g.sum(0),
        lambda g: g * torch.arange(3),
        lambda g: g.norm(p=torch.inf),
        lambda g: torch.zeros_like(g).copy_(g),
        lambda g: torch.add(g, g, alpha=2),
        lambda g: g.isfinite().all(),
    ],
)
def test_all_others_give_plain_tensors(inputs, operation: Callable[[Tensor], Tensor]):
    found, expected = parts_and_whole(inputs)
    result = operation(found)
    assert type(result) is Tensor
    torch.testing.assert_close(result, operation(expected))


def test_what_is_changed_in_place_stays_changed(inputs):
    found, expected = parts_and_whole(inputs)
    alias = found.detach()
    found.clamp_(-0.1, 0.1)
    found.add_(torch.ones_like(expected))
    expected = expected.clamp(-0.1, 0.1) + 1
    for each in (found, alias):
        torch.testing.assert_close(each.form(), expected)


@pytest.mark.parametrize("dense_first", [True, False])
def test_plain_gradients_are_added_and_parts_stay(inputs, dense_first: bool):
    found, expected = parts_and_whole(inputs)
    plain = torch.randn_like(expected)
    total = plain + found if dense_first else found.add_(plain)
    total = (total * 2 + plain).clone()
    assert total.in_parts
    expected = 2 * (expected + plain) + plain
    torch.testing.assert_close(torch.cat([rows for _, rows in total.chunks()]), expected)
    torch.testing.assert_close(total.form(), expected)


def test_a_plain_tensor_takes_them_in_place(inputs):
    found, expected = parts_and_whole(inputs)
    total = torch.ones_like(expected).add_(found)
    assert type(total) is Tensor
    torch.testing.assert_close(total, expected + 1)


def test_parts_of_two_matrices_are_made_orthogonal_to_their_own(inputs):
    """As where two parameters are one: each term has its projection."""
    (_, found, _), (_, expected, _) = (gradient_of(loss, inputs) for loss in (loss_of, whole))
    other, plain = gradient_of(loss_of, inputs)[0], gradient_of(whole, inputs)[0]
    total = found + other
    assert total.in_parts
    torch.testing.assert_close(torch.cat([rows for _, rows in total.chunks()]), expected + plain)
    torch.testing.assert_close(total.form(), expected + plain)


def test_a_gradient_is_that_of_the_weights_it_was_computed_with(inputs):
    found, _ = parts_and_whole(inputs)
    formed, expected = parts_and_whole(inputs)
    formed.form()
    with torch.no_grad():
        inputs[1] += 1
    for look in (found.form, lambda: list(found.chunks()), lambda: found + 1):
        with pytest.raises(RuntimeError, match="weights have changed since this gradient was left"):
            look()
    torch.testing.assert_close(formed + 0, expected)


def test_parts_do_not_pile_up(inputs):
    """A forgotten `zero_grad` must not cost more than it does with plain gradients."""
    parameters = [nn.Parameter(each.detach().clone()) for each in inputs[:2]]
    x = inputs[2].detach()
    for _ in range(20):
        loss_of(*parameters, x).backward()
    for parameter in parameters:
        held = sum(len(part.table) for part in parameter.grad.content.parts)
        assert held <= 4 * FEATURES
    expected = [20 * each for each in gradient_of(whole, [*parameters, x.requires_grad_()])[:2]]
    torch.testing.assert_close([parameter.grad + 0 for parameter in parameters], expected)


def test_norms_and_clipping_are_torch_s(inputs):
    found, expected = parts_and_whole(inputs)
    parameters = [nn.Parameter(torch.zeros_like(expected)) for _ in range(3)]
    others = [nn.Parameter(torch.zeros_like(expected)) for _ in range(3)]
    for kind, parameter, other in zip("pwp", parameters, others, strict=True):
        parameter.grad = found.clone() if kind == "p" else expected.clone()
        other.grad = expected.clone()
    norm = nn.utils.clip_grad_norm_(parameters, 0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(others, 0.1))
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter.grad + 0, other.grad)


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_any_optimizer_steps_by_them(inputs, in_parts: bool, set_to_none: bool):
    x = inputs[2].detach()
    weights = []
    for loss in (loss_of, whole):
        parameters = [nn.Parameter(each.detach().clone()) for each in inputs[:2]]
        if not in_parts:
            for parameter in parameters:
                parameter.register_hook(GradientForm())
        optimizer = torch.optim.Adam(parameters, lr=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad(set_to_none)
            for _ in range(2):  # accumulate
                loss(*parameters, x).backward()
            kinds = {type(parameter.grad) for parameter in parameters}
            assert kinds == {RowGradient if in_parts and loss is loss_of else Tensor}
            optimizer.step()
        weights.append(parameters)
    torch.testing.assert_close(*weights)


def test_in_sixteen_bits_parts_are_added_up_before_they_are_rounded(inputs):
    weight, dictionary, x = (each.detach().float() for each in inputs)
    narrow = [nn.Parameter(each.bfloat16()) for each in (weight, dictionary)]
    loss_of(*narrow, x).backward()
    exact = [nn.Parameter(each.detach().float()) for each in narrow]
    whole(*exact, x).backward()
    for ours, theirs in zip(narrow, exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert ours.grad.in_parts
        assert torch.equal(ours.grad + 0, theirs.grad.bfloat16())


def test_parts_larger_than_the_gradient_are_not_kept(inputs):
    weight, dictionary, _ = inputs
    x = torch.randn(FEATURES, WIDTH, dtype=torch.float64)  # as many tokens as features
    gradients = torch.autograd.grad(loss_of(weight, dictionary, x), [weight, dictionary])
    assert [type(each) for each in gradients] == [Tensor, Tensor]


def test_copies_and_pickles_are_plain(inputs):
    found, expected = parts_and_whole(inputs)
    for copied in (copy.deepcopy(found.form()), pickle.loads(pickle.dumps(found.form()))):  # noqa: S301
        torch.testing.assert_close(copied, expected)
