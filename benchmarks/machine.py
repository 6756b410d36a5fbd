"""What the machine can do: the parts of a training step that no one can do without."""

import torch

from benchmarks.rounds import Feed

COPIED = 1 << 26  # floats, 256 MiB: far more than any cache holds


def primitives(feed: Feed) -> None:
    """Time the encode GEMM, a fused Adam over all weights, and a copy of `COPIED` floats."""
    feed.imported()
    width, features = feed.size.d_model, feed.size.n_features
    encoder = torch.randn(features, width, device=feed.device)
    # A fresh result would also measure how the system hands out memory.
    affinities = torch.empty(feed.size.tokens, features, device=feed.device)
    weights = torch.zeros(2 * features, width, device=feed.device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.Adam([weights], fused=True)
    source, target = torch.ones(2, COPIED, device=feed.device)
    for x in feed:
        torch.mm(x, encoder.T, out=affinities)
        feed.lap("gemm")
        optimizer.step()
        feed.lap("adam")
        target.copy_(source)
        feed.lap("copy")
