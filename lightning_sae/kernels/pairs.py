"""The pairs whose scores are above a threshold, found while the scores are computed."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sae.kernels.affinities import launch, scores_of_tile
from lightning_sae.matches import Pairs

PAIRS_A_TOKEN = 256  # capacity at first: 3 KiB a token


def pairs_above(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    thresholds: Tensor,
    most: int | None = None,
) -> Pairs | None:
    """Find all pairs of a token and a feature whose score is above a threshold.

    No tensor of tokens x features exists: a program computes a tile of scores, keeps what is above
    thresholds and drops the rest. Pairs fill a buffer in the order in which they come by, and a
    sort restores the order afterwards. To count first and write in order would need no sort,
    but every score twice, and they are what costs. Not differentiable.

    Args:
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model), the dtype of `x`.
        bias: Shape (features,).
        scale: What the affinities of each token are multiplied by, float32, shape (tokens,).
        thresholds: Float32, one a feature, shape (features,), or one a token, shape (tokens, 1).
        most: If given, nothing is returned if more are found, and more than the buffer holds.

    Returns:
        Token (int64), feature (int64) and score (float32) of each pair, shape (pairs,) each, sorted
        by feature, then token. A score is `(x @ weight.T + bias) * scale`, accumulated in float32
        and not rounded to the dtype of `x`: each is above its threshold as it stands. NaN is above
        all.

    Raises:
        FloatingPointError: If the buffer does not hold all, and what it holds is not finite.
    """
    capacity = min(PAIRS_A_TOKEN, len(weight)) * len(x)
    count, pairs = _counted_search(x, weight, bias, scale, thresholds, capacity)
    if count > capacity:  # counted all the same
        if not bool(pairs[2].isfinite().all()):  # NaN is above all: they may be too many
            raise FloatingPointError("scores are not finite")
        if most is not None and count > most:
            return None
        count, pairs = _counted_search(x, weight, bias, scale, thresholds, count)
    token, feature, score = (part[:count] for part in pairs)
    return _in_order(feature.long() * len(x) + token, score, len(x))


def some_pairs_above(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    thresholds: Tensor,
    capacity: int,
) -> tuple[Tensor, Pairs]:
    """Find pairs as `pairs_above` does, but no more than fit, without waiting for their number.

    Args:
        x: As for `pairs_above`, and so are those that follow.
        weight: See there.
        bias: See there.
        scale: See there.
        thresholds: See there.
        capacity: How many fit, at most tokens x features, and at least 1.

    Returns:
        How many there are, int64, 0-d, and shape (capacity,) each, token, feature and score as
        `pairs_above` has them. Where there are fewer, the last pair of all with a score of zero
        takes the places that are left, at the end.
    """
    count, (token, feature, score) = _search(x, weight, bias, scale, thresholds, capacity)
    real = torch.arange(capacity, device=x.device) < count
    pair = (feature.long() * len(x) + token).where(real, len(x) * len(weight) - 1)
    return count, _in_order(pair, score.where(real, 0), len(x))


def _in_order(pair: Tensor, score: Tensor, tokens: int) -> Pairs:
    """Return token, feature and score, sorted by the numbers of pairs."""
    pair, order = pair.sort()
    feature = pair.div(max(1, tokens), rounding_mode="floor")
    return pair - feature * tokens, feature, score[order]


def _counted_search(*args: Any) -> tuple[int, Pairs]:
    """Do as `_search`, and wait for the number."""
    count, found = _search(*args)
    return int(count), found


def _search(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, thresholds: Tensor, capacity: int
) -> tuple[Tensor, Pairs]:
    """Return how many pairs there are, and of as many as the buffer holds what they are."""
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    token, feature = torch.empty(2, capacity, dtype=torch.int32, device=x.device)
    score = torch.empty(capacity, dtype=torch.float32, device=x.device)
    by_token = thresholds.dim() == 2
    thresholds = thresholds.contiguous()
    launch(
        _pairs_above,
        x,
        weight,
        bias,
        scale,
        thresholds,
        by_token,
        count,
        token,
        feature,
        score,
        capacity,
    )
    return count, (token, feature, score)


@triton.jit(do_not_specialize=["capacity"])  # differs from call to call
def _pairs_above(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    width: tl.tensor,
    tile_tokens: tl.constexpr,
    tile_features: tl.constexpr,
    tile_columns: tl.constexpr,
    in_turn: tl.constexpr,
    precision: tl.constexpr,
    thresholds: tl.tensor,
    by_token: tl.constexpr,
    pairs: tl.tensor,
    pair_token: tl.tensor,
    pair_feature: tl.tensor,
    pair_score: tl.tensor,
    capacity: tl.tensor,
) -> None:
    token, feature, score = scores_of_tile(
        x,
        weight,
        bias,
        scale,
        tokens,
        features,
        width,
        tile_tokens,
        tile_features,
        tile_columns,
        in_turn,
        precision,
    )
    is_token, is_feature = (token < tokens)[:, None], (feature < features)[None, :]
    if by_token:
        threshold = tl.load(thresholds + token, mask=token < tokens, other=0.0)[:, None]
    else:
        threshold = tl.load(thresholds + feature, mask=feature < features, other=0.0)[None, :]
    above = ~(score <= threshold) & is_token & is_feature
    # One by one: to count them in the tile first would take many more registers, and longer.
    slot = tl.atomic_add(
        pairs + tl.zeros((tile_tokens, tile_features), tl.int32), 1, mask=above, sem="relaxed"
    )
    fits = above & (slot < capacity)
    shape: tl.constexpr = (tile_tokens, tile_features)
    tl.store(pair_token + slot, tl.broadcast_to(token[:, None], shape), mask=fits)
    tl.store(pair_feature + slot, tl.broadcast_to(feature[None, :], shape), mask=fits)
    tl.store(pair_score + slot, score, mask=fits)
