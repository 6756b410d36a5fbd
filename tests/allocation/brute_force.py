"""What choices are tested against: a brute force that sorts all pairs, on awkward inputs."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sae.allocation import Matches, RankDiscount

thorough = settings(max_examples=200, deadline=None, derandomize=True)

SIZES = [(64, 96), (96, 64), (40, 33)]  # in blocks of 32, of 8, of none
PAIRS = [300, 2000, 10**6]  # in a tile: a few rows, many, all

AWKWARD = {
    "normal": lambda size, g: torch.randn(size, generator=g),
    "ties": lambda size, g: torch.randint(-3, 4, size, generator=g).float(),
    "all the same": lambda size, g: torch.ones(size),
    "few positive": lambda size, g: torch.randn(size, generator=g) - 2.5,
    "none positive": lambda size, g: -torch.rand(size, generator=g),
    "rising": lambda size, g: torch.arange(1.0, size[1] + 1).expand(size),
    "one large token": lambda size, g: torch.randn(size, generator=g) * torch.eye(size[0], 1) * 99,
    "one large feature": lambda size, g: (
        torch.randn(size, generator=g) * (1 + 99 * torch.eye(1, size[1]))
    ),
}


@st.composite
def affinities(draw: st.DrawFn) -> Tensor:
    tokens, features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(
        st.sampled_from(
            [
                st.integers(-2, 3),  # many ties, among them at zero
                st.floats(-3, 3, width=16),
                st.just(1),  # nothing but ties
                st.integers(-3, 0),  # nothing positive
            ]
        )
    )
    size = tokens * features
    flat = draw(st.lists(values, min_size=size, max_size=size))
    return torch.tensor(flat, dtype=torch.float32).view(tokens, features)


def awkward(case: str, size: tuple[int, int]) -> Tensor:
    return AWKWARD[case](size, torch.Generator().manual_seed(3))


def by_token(affinity: Tensor, k: int) -> Tensor:
    tokens, features = affinity.shape
    return _walk(affinity, [[n] * features for n in range(tokens)], [k] * tokens)


def by_batch(affinity: Tensor, budget: int) -> Tensor:
    tokens, features = affinity.shape
    return _walk(affinity, [[0] * features] * tokens, [budget])


def discounted(affinity: Tensor, k: int, exponent: float) -> Tensor:
    """Return affinities, those beyond a token's k-th times (k / rank) ** exponent."""
    worth = affinity.clone()
    for n in range(len(affinity)):
        ordered = sorted(range(affinity.shape[1]), key=lambda i: (-affinity[n, i].item(), i))
        for rank, i in enumerate(ordered, start=1):
            if rank > k:
                worth[n, i] *= (k / rank) ** exponent
    return worth


def worth_of(affinity: Tensor, discount: RankDiscount) -> Tensor:
    """Return what a discount makes of positive affinities, which is tested against `discounted`."""
    pairs = (affinity > 0).nonzero(as_tuple=True)
    return torch.zeros_like(affinity).index_put(pairs, discount(pairs[0], affinity[pairs]))


def by_feature(affinity: Tensor, budgets: list[int]) -> Tensor:
    tokens, features = affinity.shape
    return _walk(affinity, [list(range(features))] * tokens, budgets)


def _walk(affinities: Tensor, group_of: list[list[int]], budgets: list[int]) -> Tensor:
    """Walk over the pairs from large to small; a group takes pairs until its budget is spent."""
    tokens, features = affinities.shape
    pairs = [(n, i) for n in range(tokens) for i in range(features)]
    pairs.sort(key=lambda pair: (-affinities[pair].item(), pair))
    left = list(budgets)
    dense = torch.zeros_like(affinities)
    for n, i in pairs:
        group = group_of[n][i]
        if left[group] > 0 and affinities[n, i] > 0:
            dense[n, i] = affinities[n, i]
            left[group] -= 1
    return dense


def midpoints(scores: Tensor, matches: Matches) -> Tensor:
    """Return each feature's midpoint of its last chosen and first rejected score, never negative.

    A feature that chose every token gets its last chosen score, one that chose none its first
    rejected one.

    Args:
        scores: What was chosen from, shape (tokens, features).
        matches: What was chosen.
    """
    rejected = scores.index_put((matches.token, matches.feature), scores.new_tensor(-torch.inf))
    first_rejected = rejected.amax(0)
    last_chosen = scores.new_full((scores.shape[1],), torch.inf).scatter_reduce(
        0, matches.feature, scores[matches.token, matches.feature], "amin"
    )
    last_chosen = torch.where(last_chosen.isinf(), first_rejected, last_chosen)
    # A token that was turned down for want of a positive affinity sets no bound above zero.
    first_rejected = torch.where(first_rejected.isinf(), last_chosen, first_rejected.clamp_min(0))
    return ((last_chosen + first_rejected) / 2).clamp_min(0)


def check(matches: Matches, expected: Tensor) -> None:
    assert torch.equal(matches.to_dense(), expected)
    assert (matches.value > 0).all()
    order = matches.token * matches.shape[1] + matches.feature
    assert torch.equal(order, order.sort().values)
    token, feature, by_feature = matches.by_feature
    assert torch.equal(token, matches.token[by_feature])
    assert torch.equal(feature, matches.feature[by_feature])
    assert torch.equal(by_feature, (matches.feature * matches.shape[0] + matches.token).argsort())
    assert torch.equal(matches.per_token(), (expected > 0).sum(1))
    assert torch.equal(matches.per_feature(), (expected > 0).sum(0))
