"""The largest score of each block of a row, found while the scores are computed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_sae.kernels.affinities import FEATURES, TOKENS, launch, scores_of_tile

BLOCK = 32  # scores: larger ones have looser maxima, smaller ones more of them


def block_maxima(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    thresholds: Tensor | None = None,
    *,
    rows_are_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Cut the rows of scores into blocks, and find the largest score of each.

    Not differentiable.

    Args:
        x: Inputs, shape (tokens, d_model).
        weight: One row a feature, shape (features, d_model), the dtype of `x`.
        bias: Shape (features,).
        scale: What the affinities of each token are multiplied by, float32, shape (tokens,).
        thresholds: If given, scores above are counted; float32, shape (features,).
        rows_are_tokens: Whether rows are tokens, else features.

    Returns:
        Maxima, float32, shape (rows, blocks), -inf for blocks beyond the last column; and how many
        tokens score above each feature's threshold, int32, shape (features,), else 0.
    """
    tokens, features = len(x), len(weight)
    rows, columns = (tokens, features) if rows_are_tokens else (features, tokens)
    blocks = triton.cdiv(columns, FEATURES if rows_are_tokens else TOKENS) * (TOKENS // BLOCK)
    maxima = torch.empty(rows, blocks, device=x.device)
    counts = torch.zeros(features, dtype=torch.int32, device=x.device)
    launch(
        _block_maxima,
        x,
        weight,
        bias,
        scale,
        thresholds,
        maxima,
        counts,
        blocks,
        BLOCK,
        rows_are_tokens,
    )
    return maxima, counts


@triton.jit
def _block_maxima(
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
    maxima: tl.tensor,
    counts: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,
    rows_are_tokens: tl.constexpr,
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
    is_token, is_feature = token < tokens, feature < features
    if rows_are_tokens:
        score = tl.where(is_feature[None, :], score, -float("inf"))
        largest = tl.max(score.reshape(tile_tokens, tile_features // size, size), axis=2)
        block = tl.min(feature) // size + tl.arange(0, tile_features // size)
        place = token.to(tl.int64)[:, None] * blocks + block[None, :]
        tl.store(maxima + place, largest, mask=is_token[:, None])
    else:
        score = tl.where(is_token[:, None], score, -float("inf"))
        largest = tl.max(score.reshape(tile_tokens // size, size, tile_features), axis=1)
        block = tl.min(token) // size + tl.arange(0, tile_tokens // size)
        place = feature.to(tl.int64)[None, :] * blocks + block[:, None]
        tl.store(maxima + place, largest, mask=is_feature[None, :])
    if thresholds is not None:
        threshold = tl.load(thresholds + feature, mask=is_feature, other=float("inf"))
        passes = (score > threshold[None, :]) & is_token[:, None]
        passing = tl.sum(passes.to(tl.int32), axis=0)
        tl.atomic_add(counts + feature, passing, mask=is_feature, sem="relaxed")
