"""Mutual Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

from lightning_sae.allocation import Choice
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.selection import Scores


class MutualChoiceSAE(ThresholdSAE):
    """The batch spends its whole budget of k matches a token wherever affinities are largest.

    Easy tokens get few features and hard ones many; k holds on average. The allocation is that of
    BatchTopK (Bussmann et al. 2024). In inference one threshold takes the place of the batch: the
    running average of the smallest chosen affinity, and after the last step what gives k matches a
    token on held-out text.

    Arguments are those of `ThresholdSAE`.
    """

    def choose(self, scores: Scores) -> Choice:
        """Match the k * tokens pairs of largest score in the batch."""
        return self.choose_by_batch(scores)
