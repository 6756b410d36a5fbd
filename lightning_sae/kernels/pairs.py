"""The pairs whose scores exceed a bound, found while the scores are computed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sae.kernels.affinities import launch, scores_of_tile

PAIRS_A_TOKEN = 256  # room at first: 3 KiB a token


def pairs_above(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    bounds: Tensor,
    most: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find all pairs of a token and a feature whose score exceeds a bound.

    No tensor of tokens x features exists: a program computes a tile of scores, keeps what is above
    its bounds and drops the rest. Pairs take room in a buffer in the order in which they come by,
    and a sort restores the order afterwards. To count first and write in order would need no sort,
    but every score twice, and they are what costs. Not differentiable.

    Args:
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model), the dtype of `x`.
        bias: Shape (features,).
        scale: What the affinities of each token are multiplied by, float32, shape (tokens,).
        bounds: Float32, one a feature, shape (features,), or one a token, shape (tokens, 1).
        most: If given, nothing is returned if more are found, and more than there is room for.

    Returns:
        Token (int64), feature (int64) and score (float32) of each pair, shape (pairs,) each, sorted
        by feature, then token. A score is `(x @ weight.T + bias) * scale`, accumulated in float32
        and not rounded to the dtype of `x`: each is above its bound as it stands. NaN is above all.

    Raises:
        FloatingPointError: If there is no room for all, and among those found is NaN or infinity.
    """
    room = min(PAIRS_A_TOKEN, len(weight)) * len(x)
    count, *pairs = _search(x, weight, bias, scale, bounds, room)
    if count > room:  # counted all the same
        if not bool(pairs[2].isfinite().all()):  # NaN is above all: there may be no room for them
            raise FloatingPointError("scores are not finite")
        if most is not None and count > most:
            return None
        count, *pairs = _search(x, weight, bias, scale, bounds, count)
    token, feature, score = (part[:count] for part in pairs)
    pair, order = (feature.long() * len(x) + token).sort()
    feature = pair.div(max(1, len(x)), rounding_mode="floor")
    return pair - feature * len(x), feature, score[order]


def _search(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, bounds: Tensor, room: int
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many pairs there are, and of as many as there is room for what they are."""
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    token, feature = torch.empty(2, room, dtype=torch.int32, device=x.device)
    score = torch.empty(room, dtype=torch.float32, device=x.device)
    by_token = bounds.dim() == 2
    bounds = bounds.contiguous()
    launch(
        _pairs_above,
        x,
        weight,
        bias,
        scale,
        bounds,
        by_token,
        count,
        token,
        feature,
        score,
        room,
    )
    return int(count), token, feature, score


@triton.jit(do_not_specialize=["room"])  # differs from call to call
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
    bounds: tl.tensor,
    by_token: tl.constexpr,
    pairs: tl.tensor,
    pair_token: tl.tensor,
    pair_feature: tl.tensor,
    pair_score: tl.tensor,
    room: tl.tensor,
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
        bound = tl.load(bounds + token, mask=token < tokens, other=0.0)[:, None]
    else:
        bound = tl.load(bounds + feature, mask=feature < features, other=0.0)[None, :]
    above = ~(score <= bound) & is_token & is_feature
    # One by one: to count them in the tile first would take many more registers, and longer.
    slot = tl.atomic_add(
        pairs + tl.zeros((tile_tokens, tile_features), tl.int32), 1, mask=above, sem="relaxed"
    )
    fits = above & (slot < room)
    shape: tl.constexpr = (tile_tokens, tile_features)
    tl.store(pair_token + slot, tl.broadcast_to(token[:, None], shape), mask=fits)
    tl.store(pair_feature + slot, tl.broadcast_to(feature[None, :], shape), mask=fits)
    tl.store(pair_score + slot, score, mask=fits)
