"""More matches a token at the start of training than at its end."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sae.callbacks.find_sae import find_saes
from lightning_sae.checks import UsageError, require_positive

__all__ = ["KDecay"]


class KDecay(Callback):
    """Starts with more matches a token than the SAE's `k`, and goes down to it in a straight line.

    As `k_decay_steps` of EleutherAI's sparsify does, from ten times `k` there. With more matches
    more features get a gradient before they can die. In trials on the shipped model hardly any
    died, but the error at the end was larger than without: see `docs/results.md`.

    For SAEs that choose so many matches: a penalty finds its own. The SAE may be a part of the
    module that is trained. What `k` is depends on the step alone, so that a resumed run goes on as
    if it had not stopped. Before the last of these tokens, validation and checkpoints are those of
    an SAE with more matches.

    Args:
        start: Matches a token at the first step.
        tokens: Trained tokens, over all devices, after which the SAE has its own `k`.

    Raises:
        ValueError: If `tokens` is not positive; and, when training starts, if `start` is less than
            `k` or more than there are features, or the SAE does not choose by a `k`.
    """

    def __init__(self, start: int, tokens: int) -> None:
        require_positive(start=start, tokens=tokens)
        self.start = start
        self.tokens = tokens
        self._saes: list[tuple[Any, int]] = []  # and their own k

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the own k of the SAE, or of each that is trained.

        Raises:
            UsageError: If it has none that it chooses by, or `start` is out of its range.
        """
        saes = find_saes(pl_module, "history", "choose", of=self)
        for sae in saes:
            self._check(sae)
        self._saes = [(sae, sae.k) for sae in saes]

    def _check(self, sae: Any) -> None:
        if getattr(sae, "k", None) is None or hasattr(sae, "penalty_weight"):
            raise UsageError(
                f"KDecay cannot be used with {type(sae).__name__}, whose matches a penalty makes "
                "few: remove it from trainer.callbacks"
            )
        if not sae.k <= self.start <= sae.n_features:
            raise UsageError(
                f"start={self.start} of KDecay is out of range: it must be k={sae.k} to "
                f"n_features={sae.n_features}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set k for the batch by the tokens before it."""
        for sae, k in list(self._saes):
            left = max(0.0, 1 - sae.history.seen / self.tokens)
            sae.k = k + round(left * (self.start - k))
            if left == 0:
                self._saes.remove((sae, k))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the SAE with its own k, wherever the run ended."""
        for sae, k in self._saes:
            sae.k = k
