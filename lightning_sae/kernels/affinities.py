"""A tile of scores, as all kernels that never write down all of them compute it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, FEATURES = 128, 128  # of a tile
_TOKENS_IN_TURN = 8  # tiles of tokens whose inputs stay in the cache while features pass by


def launch(
    kernel: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, *args: Any
) -> None:
    """Run a kernel once for each tile.

    Args:
        kernel: Takes what `scores_of_tile` takes, in that order, then `args`.
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model), the dtype of `x`.
        bias: Shape (features,).
        scale: What the affinities of each token are multiplied by, float32, shape (tokens,).
        args: What else the kernel takes.
    """
    (tokens, width), features = x.shape, len(weight)
    if not tokens or not features:
        return
    kernel[(triton.cdiv(tokens, TOKENS) * triton.cdiv(features, FEATURES),)](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        None if scale is None else scale.contiguous(),
        tokens,
        features,
        width,
        TOKENS,
        FEATURES,
        32 if x.dtype == torch.float32 else 64,  # columns: 128 bytes
        _TOKENS_IN_TURN,
        # As precise as torch's own products: TF32 only for whoever asked torch for it.
        "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        *args,
        num_warps=8,
        num_stages=4,
    )


@triton.jit
def scores_of_tile(
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
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Compute the tile of this program: its tokens, its features, and scores in float32.

    Beyond the last token or feature, tokens, features and scores mean nothing.
    """
    tiles = tl.cdiv(tokens, tile_tokens)
    turn = in_turn * tl.cdiv(features, tile_features)
    first = tl.program_id(0) // turn * in_turn
    place, together = tl.program_id(0) % turn, min(tiles - first, in_turn)
    token = (first + place % together) * tile_tokens + tl.arange(0, tile_tokens)
    feature = place // together * tile_features + tl.arange(0, tile_features)
    # Any row will do for those beyond the last. Times the width, a number may exceed int32.
    of_token = x + tl.where(token < tokens, token, 0).to(tl.int64)[:, None] * width
    of_feature = weight + tl.where(feature < features, feature, 0).to(tl.int64)[None, :] * width
    score = tl.zeros((tile_tokens, tile_features), tl.float32)
    for start in range(0, width, tile_columns):
        column = start + tl.arange(0, tile_columns)
        inside = column < width
        left = tl.load(of_token + column[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(of_feature + column[:, None], mask=inside[:, None], other=0.0)
        score = tl.dot(left, right, score, input_precision=precision)
    score += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        score *= tl.load(scale + token, mask=token < tokens, other=0.0)[:, None]
    return token, feature, score
