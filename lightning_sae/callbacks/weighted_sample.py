"""A sample of a stream's rows, drawn with odds in proportion to weights, equal on every rank."""

import torch
from torch import Tensor

from lightning_sae.parallel import Ranks


class WeightedSample:
    """Rows of a stream drawn one by one without replacement, with odds in proportion to weights.

    Each row gets its log weight plus Gumbel noise as a key. Those of largest key, in that order,
    are such a sample (Efraimidis and Spirakis 2006), and are all that has to be kept. Rows come
    from all ranks, and the sample is the same on each.

    Args:
        keys: Keys of the rows so far, descending, float64 on the CPU, shape (kept,).
        rows: The rows, shape (kept, width).
    """

    def __init__(self, keys: Tensor | None = None, rows: Tensor | None = None) -> None:
        self.keys = torch.empty(0, dtype=torch.float64) if keys is None else keys
        self.rows = torch.empty(0, 0) if rows is None else rows

    def add(self, rows: Tensor, weights: Tensor, *, size: int, seed: int, ranks: Ranks) -> None:
        """Draw from the rows so far and these, at most `size`.

        Args:
            rows: Shape (n, width); n may differ between ranks.
            weights: Not negative; rows of weight zero are never drawn. Shape (n,).
            size: Rows to keep.
            seed: Decides the noise; the same on every rank, another for each call.
            ranks: Those that have rows.
        """
        ours = ranks.index
        longest = int(ranks.all_reduce(torch.tensor(len(rows), device=rows.device), "max"))
        if longest == 0:
            return
        table = weights.new_zeros(ranks.size, longest)
        table[ours, : len(rows)] = weights
        table = ranks.all_reduce(table).cpu().double()  # (ranks, longest)
        noise = torch.rand(
            table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        keys = torch.cat([self.keys, (table.log() - (-noise.log()).log()).flatten()])
        best = keys.topk(min(size, len(keys)))
        chosen = best.indices[best.values > -torch.inf]
        before = len(self.keys)
        self.keys = keys[chosen]
        chosen = chosen.to(rows.device)
        old, new = chosen < before, chosen >= before
        rank, row = (chosen - before) // longest, (chosen - before) % longest
        mine = new & (rank == ours)
        merged = rows.new_zeros(len(chosen), rows.shape[1])
        merged[mine] = rows[row[mine]]
        merged = ranks.all_reduce(merged)  # each new row is one rank's, and zero on the others
        if before:
            merged[old] = self.rows.to(merged)[chosen[old]]
        self.rows = merged
