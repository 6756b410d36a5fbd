"""Feature Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sae.allocation import (
    Choice,
    RankDiscount,
    feature_choice_counting,
    midpoint_thresholds,
    round_budgets,
    scaled_thresholds,
    shared_out,
    zipf_budgets,
)
from lightning_sae.architectures.budget_law import budget_law
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.architectures.threshold_tracking import track
from lightning_sae.checks import UsageError, require_choice, require_not_negative
from lightning_sae.core.loading import require_finite
from lightning_sae.host_copy import HostCopy
from lightning_sae.numerics import widest_float
from lightning_sae.selection import Scores


class FeatureChoiceSAE(ThresholdSAE):
    """Every feature has a budget of tokens, and chooses those of largest affinity.

    A run has two phases. First the batch chooses, as in Mutual Choice, until features have found
    their place. Then each gets a budget, a share of the tokens, by the density it reached, but not
    less than `min_matches`, and keeps it: none can die out. Budgets sum to k matches a token.

    One threshold a feature keeps it to its budget: it rises while more tokens are above it than
    the budget has matches, and falls while there are fewer. In inference a feature takes the tokens
    above its threshold. In training it does the same, so that a feature with five matches a batch
    on average may take one or nine that deserve it; with `per_batch` it takes exactly five.

    The paper sets budgets by a Zipf distribution and has features choose from the batch: that is
    `budgets="zipf"`, `min_matches=1` and `per_batch=True`. Its constants, how features get their
    ranks, what comes before and how a token is encoded without a batch are not known to us.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        budgets: How matches are shared out among the features: `measured`, in proportion to the
            densities of the first phase; `zipf`, along a Zipf-Mandelbrot law, by the rank of these
            densities; or `uniform`, the same for each.
        per_batch: Whether budgets are of each batch by itself. There is no `rank_discount` then.
        mutual_choice_share: Share of the run, 0 to 1, in which the batch chooses first. At 0
            features choose from the start, and budgets follow the law, by rank as features stand.
            Without a Trainer, or a set number of steps, the first phase lasts `dead_after_tokens`
            tokens, over which densities are measured.
        mutual_choice_tokens: The same in tokens; it wins where it is given.
        zipf_exponent: s in (rank + q)^-s. Default: fitted; 1 if features choose from the start.
        zipf_offset: q in (rank + q)^-s. Default: fitted; n_features / 1000 from the start.
        min_matches: Smallest budget, in matches a batch; below 1 a feature takes turns. Default: a
            tenth of the mean budget. Not for `uniform`.
        max_density: Share of a batch's tokens that one feature may take at most. Only for `zipf`.
        options: Those of `ThresholdSAE`. With `start_from`, set `mutual_choice_share` to 0 to keep
            the densities that were reached.

    Attributes:
        tracking: How far a threshold moves, as a share of itself, in a batch that has twice as many
            tokens above it as the budget says.
        patience: How many matches too many move it as far as itself, where those are fewer. Rare
            features fire in bursts, a document long, which their thresholds should outlast. There
            is none with a feature that does not fire at all.
        steepness: Power of the densities reached that measured budgets follow. Above 1, because the
            weakest matches of frequent features explain more than those of rare ones.
        choosing: Whether features choose by now, bool, 0-d.
        target_density: Each feature's budget as a share of tokens, float32, (n_features,); zero
            until features choose.

    Raises:
        ValueError: If a size is out of range.
    """

    tracking = 0.02
    patience = 1000
    steepness = 1.08
    threshold_per_feature: ClassVar[bool] = True
    choosing: Tensor
    target_density: Tensor
    _started = False  # in this process: a resumed run may have other batches

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        budgets: Literal["measured", "uniform", "zipf"] = "measured",
        per_batch: bool = False,
        mutual_choice_share: float = 0.85,
        mutual_choice_tokens: int | None = None,
        zipf_exponent: float | None = None,
        zipf_offset: float | None = None,
        min_matches: float | None = None,
        max_density: float = 0.5,
        **options: Any,
    ) -> None:
        require_choice(budgets=budgets, of=("measured", "uniform", "zipf"))
        require_not_negative(
            min_matches=min_matches or 0.0, mutual_choice_tokens=mutual_choice_tokens or 0
        )
        require_not_negative(zipf_exponent=zipf_exponent or 0.0, zipf_offset=zipf_offset or 0.0)
        if not 0 <= mutual_choice_share <= 1:
            raise UsageError(
                f"mutual_choice_share={mutual_choice_share} must be a share of the run, 0 to 1; "
                "mutual_choice_tokens is a number of tokens"
            )
        if not k / n_features <= max_density <= 1:
            raise UsageError(
                f"max_density={max_density} is out of range: as a share of tokens it is at most 1, "
                f"and k={k} matches need at least k / n_features = {k / n_features:.3g}"
            )
        super().__init__(d_model, n_features, k, **options)
        self.budgets = budgets
        self.per_batch = per_batch
        self.mutual_choice_share = mutual_choice_share
        self.mutual_choice_tokens = mutual_choice_tokens
        self.zipf_exponent = zipf_exponent
        self.zipf_offset = zipf_offset
        self.min_matches = min_matches
        self.max_density = max_density
        # In this order: shared-out features are loaded a tensor at a time, and a state in which
        # features choose, but have no budgets, is refused.
        self.register_buffer("target_density", torch.zeros(n_features, dtype=torch.float32))
        self.register_buffer("choosing", torch.tensor(False))
        self._chooses, self._shares = HostCopy(), HostCopy()

    @property
    def discount(self) -> RankDiscount | None:
        """That of all, but none where features spend their budgets in every batch."""
        return None if self.per_batch else super().discount

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse also budgets that are negative, or, once features choose, all zero."""
        super().check_state(state)
        require_finite(state, "target_density", least=0)
        if bool(state.get("choosing", False)) and "target_density" in state:
            require_finite(
                {"target_density": state["target_density"].max()}, "target_density", beyond=0
            )

    def prepare(self, x: Tensor) -> None:
        """Let features choose from this batch on, if the first phase is over.

        A batch that is too small for `min_matches`, such as the last one of an epoch, is chosen
        from as in the first phase, and budgets wait for the next one.

        Raises:
            ValueError: If the first batch of a run is too small already.
        """
        super().prepare(x)
        if not self._chooses.of(self.choosing):
            tokens = self.batch_tokens(x)
            if tokens and not self._started:
                self._require_enough(tokens)
                self._started = True
            if self._is_enough(tokens) and self._first_phase_is_over():
                self.begin_feature_choice(tokens)

    def choose(self, scores: Scores) -> Choice:
        """Match by mutual choice at first, later every feature with its budget of tokens."""
        if not self._chooses.of(self.choosing):
            return self.choose_by_batch(scores)
        if self.per_batch or not self.has_thresholds:  # nothing is tracked yet
            return self._choose_per_batch(scores)
        matches = self.choose_per_token(scores)
        return Choice(matches, matches.per_feature())

    def _choose_per_batch(self, scores: Scores) -> Choice:
        tokens = self.batch_tokens(scores)
        # The same on every rank, and again after a resumption: tokens_seen is both.
        seed = self.history.seen
        budgets = round_budgets(self.budgets_for(tokens), seed=seed).clamp(max=tokens)
        return feature_choice_counting(
            scores, budgets.to(scores.device), self.threshold, ranks=self.choosing_ranks
        )

    def prefix_order(self) -> Tensor | None:
        """Return features' places by their budgets, the largest first, once they have some."""
        place = self.target_density.argsort(descending=True, stable=True).argsort()
        return place if self._chooses.of(self.choosing) else None

    def budgets_for(self, tokens: int) -> Tensor:
        """Return each feature's budget in a batch of so many tokens, once features choose.

        Returns:
            Real numbers of matches that sum to k * tokens, float64 on the CPU, (n_features,).
        """
        shares = self._shares.of(self.target_density).double()
        return self._in_proportion(shares, tokens)

    def _in_proportion(self, shares: Tensor, tokens: int) -> Tensor:
        return shares * (self.k * tokens / shares.sum())

    @torch.no_grad()
    def begin_feature_choice(self, tokens: int) -> None:
        """Let features choose from now on, with budgets by the densities they reached.

        Args:
            tokens: Tokens of a batch, for which `min_matches` holds.

        Raises:
            ValueError: If they are too few for `min_matches`.
        """
        self._require_enough(tokens)
        density = self.history.density.double().cpu()
        self.target_density.copy_(self._budgets(tokens, density) / tokens)
        self.choosing.fill_(True)
        if density.any():  # thresholds are known, and nearly right where a budget is the density
            least = 1 / self.history.window
            change = (density.clamp_min(least) / self.target_density.double().cpu()).clamp(max=8)
            self.threshold.mul_(change.pow(1 / 3).to(self.threshold))

    def _budgets(self, tokens: int, density: Tensor) -> Tensor:
        """Return each feature's budget in a batch of so many tokens, float64, (n_features,)."""
        total = self.k * tokens
        mean = total / self.n_features
        if self.budgets == "uniform":
            return density.new_full((self.n_features,), mean)
        least = mean / 10 if self.min_matches is None else min(self.min_matches, mean)
        if self.budgets == "measured" and density.any():
            weights = density.clamp_min(density[density > 0].min() / 10) ** self.steepness
            return shared_out(total, weights, minimum=least, maximum=tokens)
        exponent, offset = budget_law(self.history, self.zipf_exponent, self.zipf_offset)
        by_rank = zipf_budgets(
            total,
            self.n_features,
            exponent=exponent,
            offset=offset,
            minimum=least,
            maximum=max(self.max_density * tokens, least),
        )
        # Where no density was measured all are equal, and features keep the order they are in.
        order = density.argsort(descending=True, stable=True)
        return torch.empty_like(by_rank).scatter_(0, order, by_rank)

    def _first_phase_is_over(self) -> bool:
        seen = self.history.seen
        if self.mutual_choice_tokens is not None:
            return seen >= self.mutual_choice_tokens
        if self.mutual_choice_share == 0:
            return True
        over = self.share_is_over(self.mutual_choice_share)
        return seen >= self.history.dead_after_tokens if over is None else over

    def _is_enough(self, tokens: int) -> bool:
        least = 0 if self.budgets == "uniform" else self.min_matches or 0
        return tokens > 0 and self.k * tokens >= least * self.n_features

    def _require_enough(self, tokens: int) -> None:
        if not self._is_enough(tokens):
            batches = self.layout.ranks.size if self.scope == "local" else 1
            needed = math.ceil((self.min_matches or 0) * self.n_features / self.k) * batches
            raise UsageError(
                f"k={self.k} matches for each of {tokens} tokens cannot give each of "
                f"n_features={self.n_features} features min_matches={self.min_matches}: batch_size="
                f"{needed} or min_matches={self.k * tokens / self.n_features:.3g} can"
            )

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Move each threshold towards the one that as many tokens pass as the budget allows."""
        ranks = self.layout.ranks
        if not self._chooses.of(self.choosing):
            super().observe(scores, choice)
            return
        if choice.passing is None:
            raise TypeError("a choice by features must count the tokens that pass thresholds")
        tokens = ranks.count(scores, scores.device)
        shares = self.target_density.to(widest_float(self.target_density.device))
        budgets = self._in_proportion(shares, tokens).to(self.threshold)
        if not self.has_thresholds:  # features choose from the start
            counts = budgets.round().long().clamp(max=tokens).to(scores.device)
            self.threshold.copy_(midpoint_thresholds(scores, counts, ranks=ranks))
            return
        missed = self.history.tokens_since_fired * self.target_density
        rates = {"tracking": self.tracking, "patience": self.patience}
        track(self.threshold, ranks.all_reduce(choice.passing), budgets, missed, **rates)
        self._note_thresholds()

    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return all thresholds times the factor that gives exactly k matches a token here.

        What they are to each other stays: how often a rare feature fires depends on the documents.
        """
        if not self._chooses.of(self.choosing) or not self.has_thresholds:
            return super().calibrated(scaled)
        scores, ranks = self.scores(scaled), self.layout.ranks
        budget = self.k * ranks.count(scaled, scaled.device)
        return scaled_thresholds(
            scores, self.threshold, budget, discount=self.discount, ranks=ranks
        )
