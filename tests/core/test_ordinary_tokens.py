"""Origin and scale of activations, a few of which are massive."""

import pytest
import torch
from torch import Tensor

from lightning_sae import MutualChoiceSAE, TopKSAE
from lightning_sae.core.ordinary_tokens import geometric_median, mean_and_variance
from lightning_sae.parallel import Ranks
from tests.helpers.architectures import D_MODEL, activations, every_architecture
from tests.helpers.ddp import run_on_two

TOKENS = 400


def sample(massive: int, times: float) -> Tensor:
    """Tokens around 20, of which some, all in one direction, are so many times as far away."""
    x = activations(TOKENS).double()
    x[:massive] = 20 + times * (x[:1] - 20)
    return x[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))]


def slow_mean_and_variance(x: Tensor, massive: int) -> tuple[Tensor, Tensor]:
    """Of all but the longest tokens."""
    ordinary = x[(x - 20).norm(dim=1).argsort()[: len(x) - massive]]
    mean = ordinary.mean(0)
    return mean, (ordinary - mean).square().sum(1).mean()


@pytest.mark.parametrize("massive", [0, 1, 4, 40])
@pytest.mark.parametrize("times", [1e2, 1e3, 1e5])
def test_massive_tokens_have_no_part_in_it(massive: int, times: float):
    x = sample(massive, times)
    for found, expected in zip(
        mean_and_variance(x, Ranks()), slow_mean_and_variance(x, massive), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_without_any_it_is_the_mean_of_all_bit_for_bit():
    x = sample(0, 1.0)
    mean, variance = mean_and_variance(x, Ranks())
    assert torch.equal(mean, x.sum(0) / len(x))
    assert torch.equal(variance, (x - mean).square().sum() / len(x))


def test_no_point_is_nearer_to_all_than_the_geometric_median():
    x = sample(20, 30.0)
    centre = geometric_median(x, Ranks())
    pull = (x - centre) / (x - centre).norm(dim=1, keepdim=True)
    assert pull.mean(0).norm() < 1e-3  # its gradient


def test_a_token_at_the_median_itself():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    mean, variance = mean_and_variance(x, Ranks())
    assert mean.tolist() == [0, 0]
    assert variance == 4 / 5


def of_rank(rank: int, first: int) -> tuple[Tensor, Tensor]:
    return mean_and_variance(sample(4, 1e3).split([first, TOKENS - first])[rank], Ranks())


@pytest.mark.parametrize("first", [200, 10, 0])
def test_two_ranks_find_what_one_does(first: int):
    expected = mean_and_variance(sample(4, 1e3), Ranks())
    for found in run_on_two(of_rank, first):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_architecture
def test_one_token_of_the_first_batch_does_not_decide_for_all(make):
    sae, x = make(), activations(256)
    x[7] = 20 + 1e4 * (x[7] - 20)
    sae.loss(x)
    typical = (sae.scaled(activations(256)) - sae.b_dec.detach()).square().sum(1).mean()
    torch.testing.assert_close(typical.item(), float(D_MODEL), rtol=0.05, atol=0)


def later_batch(rank: int, cut: int, option: float | None) -> dict[str, Tensor]:
    """Return what is logged of a batch with 3 massive tokens in 256, after one without."""
    torch.manual_seed(0)
    sae = MutualChoiceSAE(D_MODEL, 48, 4, aux_coefficient=0, max_norm_multiple=option)
    x = activations(256)
    sae.loss(x[:cut] if rank == 0 else x[cut:])
    x[:3] += 50 * (x - x.mean(0)).square().mean().sqrt()
    _, stats = sae.loss(x[:cut] if rank == 0 else x[cut:])
    return stats | {"tokens": sae.tokens_seen}


@pytest.mark.parametrize(("option", "tokens"), [(None, 512), (20.0, 509), (200.0, 512)])
def test_massive_tokens_of_any_batch_are_shown_and_left_out_if_asked_to(option, tokens):
    found = later_batch(0, 256, option)
    share = 0.0 if option == 200 else 3 / 256
    torch.testing.assert_close(found["massive_fraction"].item(), share)
    assert found["tokens"] == tokens
    assert tokens == 512 or found["loss"] < 2
    for both in run_on_two(later_batch, 100, option):
        torch.testing.assert_close(both, found, rtol=1e-4, atol=1e-6)


def test_a_multiple_is_more_than_one():
    with pytest.raises(ValueError, match=r"max_norm_multiple=0\.5 must be more than 1"):
        TopKSAE(D_MODEL, 8, 1, max_norm_multiple=0.5)


def test_what_is_not_finite_is_still_refused():
    x = activations(64)
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="they must be finite"):
        TopKSAE(D_MODEL, 8, 1).loss(x)


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_where_most_tokens_are_alike_the_others_are_not_massive(spread):
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:600] *= spread
    mean, variance = mean_and_variance(x, Ranks())
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, (x - x.mean(0)).square().sum(1).mean())
