"""Which tokens get more matches than others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sae.callbacks.drawing import DARK, LIGHT, MEDIUM, add_figures, empty_figure
from lightning_sae.callbacks.held_out import HeldOutCallback, known_of
from lightning_sae.checks import UsageError
from lightning_sae.metrics import Correlation, next_token_losses
from lightning_sae.metrics.runs import kept_and_scored
from lightning_sae.parallel import Ranks
from lightning_sae.residual_stream import ResidualStream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUPS = 10
_MOST_BARS = 60
_HARDNESS = ("surprise", "next_loss", "distance")


class AdaptiveComputationCallback(HeldOutCallback):
    """Shows whether harder tokens get more matches, as they may in Mutual and Feature Choice.

    Under `val/` or `test/`, Pearson's correlation of a token's matches with

    * `l0_correlation_surprise`: the language model's loss of predicting this token from those
      before it, in nats. The token is what the activation is about: was it hard to see coming?
    * `l0_correlation_next_loss`: its loss of predicting the next token from here. The activation is
      what that prediction is made of: is it hard to see further?
    * `l0_correlation_distance`: the distance of its activation from the mean activation. The square
      of that is what the reconstruction has to explain, the token's share of the variance in `fvu`.
      Unlike the error that is left, it does not depend on the matches the token got; not being
      squared, a few far tokens do not decide. Part of this is mere size: the affinities of a far
      token are large, and pass a threshold more often.

    Nothing is logged where every token has the same number of matches, as in TopK. Measured are
    tokens that have both losses, so neither the first nor the last of a context, nor padding.

    Into loggers, as with `FeatureDensityFigures`, go the figures `matches_by_surprise` and
    `matches_per_token`, drawn from the tokens of the first device.

    It needs data as `HeldOutCallback` says, and a module, or a part of it, with
    `match(activations)`, which returns `Matches`, and the mean activation as `input_mean`,
    (d_model,), as `SparseAutoencoder` has.

    Args:
        tokens: Tokens to measure on, over all devices, in whole contexts; each is run through the
            language model once in a run. The default leaves correlations a standard error below
            0.01.

    Raises:
        ValueError: If `tokens` is not positive.
    """

    needs: ClassVar[tuple[str, ...]] = ("match", "input_mean")

    def __init__(self, tokens: int = 16_384) -> None:
        super().__init__(tokens)
        self._correlations: dict[str, Correlation] = {}  # of matches with each kind of hardness
        self._drawn: list[Tensor] = []  # matches and surprise, (2, tokens), of this rank

    def start(self, ranks: Ranks) -> None:
        """Forget what was measured."""
        self._drawn = []
        self._correlations = {name: Correlation(process_group=ranks.group) for name in _HARDNESS}

    def measure(self, sae: Any, residual_stream: ResidualStream, batch: Mapping[str, Any]) -> None:
        """Run the language model on a batch and compare its losses with the SAE's matches."""
        input_ids, kept, known = batch["input_ids"], batch["kept"], known_of(batch)
        mask = known.get("attention_mask")
        _, scored = kept_and_scored(input_ids, kept, mask)
        scored[:, 0] = False  # no token before it that could predict it
        if mask is not None:
            scored[:, 1:] &= mask[:, :-1] != 0
        x = batch["activations"][scored[kept]]  # (scored, d_model)
        encoded = batch.get("encoded")
        codes = sae.match(batch["activations"]) if encoded is None else encoded.codes
        matches = codes.per_token()[scored[kept]]
        losses = self.remembered(
            lambda: next_token_losses(
                residual_stream.replace(input_ids, lambda x: x, **known), input_ids
            ),
            *(residual_stream, batch),
        )
        inner = scored[:, 1:-1]
        hardness = {
            "surprise": losses[:, :-1][inner],
            "next_loss": losses[:, 1:][inner],
            "distance": (x[:, : len(sae.input_mean)] - sae.input_mean).norm(dim=1),
        }
        for name, each in hardness.items():
            self._correlations[name].to(x.device).update(matches, each)
        self._drawn.append(torch.stack([matches.float(), hardness["surprise"]]).cpu())

    def log_results(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log the correlations and draw."""
        for name, correlation in self._correlations.items():
            # Equal on all ranks, and so is whether it is logged.
            value = correlation.to(pl_module.device).compute()
            if not value.isnan():
                pl_module.log(f"{stage}/l0_correlation_{name}", value, sync_dist=True)
        matches, surprise = torch.cat([torch.empty(2, 0), *self._drawn], dim=1)
        figures = {
            f"{stage}/matches_by_surprise": lambda: plot_matches_by_loss(matches, surprise),
            f"{stage}/matches_per_token": lambda: plot_matches_per_token(matches),
        }
        if len(matches):
            add_figures(trainer, figures)


def plot_matches_by_loss(matches: Tensor, loss: Tensor) -> Figure:
    """Draw how many matches tokens get, against the tenth of the tokens their loss is in.

    Args:
        matches: Matches of each token, (tokens,).
        loss: Loss of each token, in nats, (tokens,).

    Returns:
        A figure that belongs to no window: save it with `savefig`, or let a notebook show it. Its
        line is the mean, its band holds the middle half of each tenth.

    Raises:
        ValueError: If there is no token, or the shapes are not as above.
    """
    if matches.ndim != 1 or matches.shape != loss.shape or not len(matches):
        shapes = f"{tuple(matches.shape)} and loss of shape {tuple(loss.shape)}"
        raise UsageError(f"matches of shape {shapes}: both must be (tokens,), at least one")
    order = loss.cpu().argsort(stable=True)
    groups = matches.cpu().double()[order].tensor_split(min(_GROUPS, len(order)))
    middles = [group.median().item() for group in loss.cpu()[order].tensor_split(len(groups))]
    tenths = range(1, len(groups) + 1)

    figure, axes = empty_figure("Matches by loss", f"{len(order):,} tokens, easiest tenth first")
    low = [group.quantile(0.25).item() for group in groups]
    high = [group.quantile(0.75).item() for group in groups]
    axes.fill_between(tenths, low, high, color=LIGHT, label="middle half of the tokens")
    axes.plot(tenths, [group.mean().item() for group in groups], "o-", color=DARK, label="mean")
    axes.set_xticks(tenths, [f"{middle:.2g}" for middle in middles])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("language model's loss, median of each tenth of the tokens (nats)")
    axes.set_ylabel("matches per token")
    axes.legend(loc="lower right", frameon=False)
    return figure


def plot_matches_per_token(matches: Tensor) -> Figure:
    """Draw how many tokens get how many matches.

    Args:
        matches: Matches of each token, (tokens,).

    Returns:
        A figure that belongs to no window: save it with `savefig`, or let a notebook show it.

    Raises:
        ValueError: If there is no token, or the shape is not as above.
    """
    if matches.ndim != 1 or not len(matches):
        raise UsageError(f"matches of shape {tuple(matches.shape)}: must be (tokens,), at least 1")
    values = matches.cpu().double()
    least, most = int(values.min()), int(values.max())
    width = math.ceil((most - least + 1) / _MOST_BARS)  # whole, for each bar to hold as many values
    bars = math.ceil((most - least + 1) / width)
    edges = torch.arange(bars + 1, dtype=torch.float64) * width + least - 0.5
    counts = torch.histogram(values, edges).hist

    mean, spread = values.mean().item(), values.std(correction=0).item()
    figure, axes = empty_figure(
        "Matches per token", f"{len(values):,} tokens, mean {mean:.1f}, spread {spread:.1f}"
    )
    axes.stairs(counts.numpy(), edges.numpy(), fill=True, color=MEDIUM)
    axes.axvline(mean, color=DARK, linewidth=1)
    axes.set_xlabel("matches")
    axes.set_ylabel("tokens")
    return figure
