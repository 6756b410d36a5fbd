"""The pairs whose affinities exceed a bound, found while the affinities are computed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS_A_TOKEN = 256  # room at first: 3 KiB a token


def pairs_above(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find all pairs of a token and a feature whose affinity exceeds the feature's bound.

    No tensor of tokens x features exists: a program computes a tile of affinities, keeps what is
    above its bounds and drops the rest. Programs take room in a buffer in the order in which they
    come by, and a sort restores the order afterwards. To count first and write in order would need
    no sort, but every affinity twice, and they are what costs. Not differentiable.

    Args:
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model), the dtype of `x`.
        bias: Shape (features,).
        bounds: One a feature, float32, shape (features,).

    Returns:
        Token (int64), feature (int64) and affinity (float32) of each pair, shape (pairs,) each,
        sorted by token, then feature. An affinity is `x @ weight.T + bias`, accumulated in float32
        and not rounded to the dtype of `x`: each is above its bound as it stands.
    """
    room = min(PAIRS_A_TOKEN, len(weight)) * len(x)
    count, *pairs = _search(x, weight, bias, bounds, room)
    if count > room:  # counted all the same
        count, *pairs = _search(x, weight, bias, bounds, count)
    token, feature, affinity = (part[:count] for part in pairs)
    order = (token.long() * len(weight) + feature).argsort()
    return token[order].long(), feature[order].long(), affinity[order]


def _search(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Tensor, room: int
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many pairs there are, and of as many as there is room for what they are."""
    (tokens, width), features = x.shape, len(weight)
    count = torch.zeros(1, dtype=torch.int64, device=x.device)
    token, feature = torch.empty(2, room, dtype=torch.int32, device=x.device)
    affinity = torch.empty(room, dtype=torch.float32, device=x.device)
    # Larger ones spill many registers, as compiled for an H100.
    tile = (128, 64, 32) if x.dtype == torch.float32 else (128, 128, 64)
    _pairs_above[(triton.cdiv(tokens, tile[0]) * triton.cdiv(features, tile[1]),)](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        bounds.contiguous(),
        count,
        token,
        feature,
        affinity,
        tokens,
        features,
        width,
        room,
        *tile,
        num_warps=8,
    )
    return int(count), token, feature, affinity


@triton.jit(do_not_specialize=["room"])  # differs from call to call
def _pairs_above(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    bounds: tl.tensor,
    pairs: tl.tensor,
    pair_token: tl.tensor,
    pair_feature: tl.tensor,
    pair_affinity: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    width: tl.tensor,
    room: tl.tensor,
    tile_tokens: tl.constexpr,
    tile_features: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    # All tokens of a tile of features come one after the other: weights leave memory once.
    tile = tl.program_id(0)
    tiles = tl.cdiv(tokens, tile_tokens)
    token = (tile % tiles) * tile_tokens + tl.arange(0, tile_tokens)
    feature = (tile // tiles) * tile_features + tl.arange(0, tile_features)
    is_token, is_feature = token < tokens, feature < features
    of_token = x + token.to(tl.int64)[:, None] * width  # times the width, it may exceed int32
    of_feature = weight + feature.to(tl.int64)[None, :] * width
    affinity = tl.zeros((tile_tokens, tile_features), tl.float32)
    for start in range(0, width, tile_columns):
        column = start + tl.arange(0, tile_columns)
        inside = column < width
        left = tl.load(
            of_token + column[None, :], mask=is_token[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            of_feature + column[:, None], mask=inside[:, None] & is_feature[None, :], other=0.0
        )
        affinity = tl.dot(left, right, affinity, input_precision="ieee")  # float32, not TF32
    affinity += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    bound = tl.load(bounds + feature, mask=is_feature, other=float("inf"))
    above = ((affinity > bound[None, :]) & is_token[:, None]).to(tl.int32)
    total = tl.sum(above)
    if total > 0:
        a_token = tl.sum(above, axis=1)
        taken = tl.atomic_add(pairs, total.to(tl.int64), sem="relaxed")
        slot = (tl.cumsum(a_token, axis=0) - a_token)[:, None] + tl.cumsum(above, axis=1) - above
        fits = (above > 0) & (slot < room - taken)
        tl.store(pair_token + taken + slot, token[:, None], mask=fits)
        tl.store(pair_feature + taken + slot, feature[None, :], mask=fits)
        tl.store(pair_affinity + taken + slot, affinity, mask=fits)
