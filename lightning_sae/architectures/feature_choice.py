"""Feature Choice: Ayonrinde 2024, https://arxiv.org/abs/2411.02124."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sae.allocation import Choice, feature_choice_counting, midpoint_thresholds
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.checks import UsageError, require_choice, require_not_negative
from lightning_sae.core.loading import require_finite
from lightning_sae.selection import Scores
from lightning_sae.zipf import ZipfFitError, fit_zipf, round_budgets, zipf_budgets

_LEAST = 1e-3  # a threshold that sank to zero could not rise again in proportion


class FeatureChoiceSAE(ThresholdSAE):
    """Every feature has a budget of tokens in each batch, and chooses those of largest affinity.

    A run has two phases. First the batch chooses, as in Mutual Choice, until features have found
    their place. Then features are ranked by the density they reached, a Zipf-Mandelbrot law is
    fitted to these densities, and from then on each feature has the budget that the law gives its
    rank. Ranks and law stay as they are. Budgets sum to k matches a token, and each is at least
    one match a batch, so that a feature fires in every batch in which its affinity is positive
    anywhere.

    In inference one threshold a feature takes the place of the batch: the one above which the
    feature fires as often as its budget allows. It is tracked in training: it rises while more
    tokens are above it than the budget has matches, and falls while there are fewer.

    The paper sets budgets by a Zipf distribution. Its constants, how features get their ranks,
    what comes before and how a token is encoded without a batch are not known to us.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        budgets: How matches are shared out among the features: `zipf`, or `uniform`, the same for
            each.
        mutual_choice_share: Share of the run, 0 to 1, in which the batch chooses first. At 0
            features choose from the start, ranked as they stand. In a loop without a Trainer nobody
            knows how long the run will be: there, and if it has no set number of steps, the first
            phase lasts `dead_after_tokens` tokens, over which densities are measured.
        mutual_choice_tokens: The same in tokens; it wins where it is given.
        zipf_exponent: s in (rank + q)^-s. Default: fitted; 1 if features choose from the start.
        zipf_offset: q in (rank + q)^-s. Default: fitted; n_features / 1000 from the start.
        min_matches: Smallest budget, in matches a batch; below 1 a feature takes turns. Only for
            `zipf`.
        max_density: Share of a batch's tokens that one feature may take at most. Only for `zipf`.
        options: Those of `ThresholdSAE`. With `start_from`, set `mutual_choice_share` to 0 to keep
            the densities that were reached.

    Attributes:
        tracking: How far a threshold moves in a batch, as a share of itself, at most.
        choosing: Whether features choose by now, bool, 0-d.
        target_density: Each feature's budget as a share of tokens, float32, (n_features,); zero
            until features choose.

    Raises:
        ValueError: If a size is out of range.
    """

    tracking = 0.05
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
        budgets: Literal["uniform", "zipf"] = "zipf",
        mutual_choice_share: float = 0.85,
        mutual_choice_tokens: int | None = None,
        zipf_exponent: float | None = None,
        zipf_offset: float | None = None,
        min_matches: float = 1.0,
        max_density: float = 0.5,
        **options: Any,
    ) -> None:
        require_choice(budgets=budgets, of=("uniform", "zipf"))
        require_not_negative(
            min_matches=min_matches, mutual_choice_tokens=mutual_choice_tokens or 0
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
        self.mutual_choice_share = mutual_choice_share
        self.mutual_choice_tokens = mutual_choice_tokens
        self.zipf_exponent = zipf_exponent
        self.zipf_offset = zipf_offset
        self.min_matches = min_matches
        self.max_density = max_density
        self.register_buffer("choosing", torch.tensor(False))
        self.register_buffer("target_density", torch.zeros(n_features, dtype=torch.float32))

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
        if not self.choosing:
            tokens = self.batch_tokens(x)
            if tokens and not self._started:
                self._require_enough(tokens)
                self._started = True
            if self._is_enough(tokens) and self._first_phase_is_over():
                self.begin_feature_choice(tokens)

    def choose(self, scores: Scores) -> Choice:
        """Match by mutual choice at first, later every feature with its budget of tokens."""
        if not self.choosing:
            return self.choose_by_batch(scores)
        tokens = self.batch_tokens(scores)
        # The same on every rank, and again after a resumption: tokens_seen is both.
        seed = int(self.history.tokens_seen)
        budgets = round_budgets(self.budgets_for(tokens), seed=seed).clamp(max=tokens)
        return feature_choice_counting(
            scores, budgets.to(scores.device), self.threshold, ranks=self.choosing_ranks
        )

    def budgets_for(self, tokens: int) -> Tensor:
        """Return each feature's budget in a batch of so many tokens, once features choose.

        Returns:
            Real numbers of matches that sum to k * tokens, float64 on the CPU, (n_features,).
        """
        shares = self.target_density.double().cpu()
        return shares * (self.k * tokens / shares.sum())

    @torch.no_grad()
    def begin_feature_choice(self, tokens: int) -> None:
        """Let features choose from now on, with budgets by the rank of their density.

        Args:
            tokens: Tokens of a batch, for which `min_matches` holds.

        Raises:
            ValueError: If they are too few for `min_matches`.
        """
        self._require_enough(tokens)
        exponent, offset = self._law() if self.budgets == "zipf" else (0.0, 0.0)
        by_rank = zipf_budgets(
            self.k * tokens,
            self.n_features,
            exponent=exponent,
            offset=offset,
            minimum=min(self.min_matches, self.k * tokens / self.n_features),
            maximum=max(self.max_density * tokens, self.min_matches),
        )
        # Where no density was measured all are equal, and features keep the order they are in.
        order = self.history.density.argsort(descending=True, stable=True)
        self.target_density[order] = (by_rank / tokens).to(self.target_density)
        self.choosing.fill_(True)

    def _law(self) -> tuple[float, float]:
        """Return exponent and offset of the budgets: as given, else as fitted, else a guess."""
        exponent, offset = 1.0, self.n_features / 1000
        given = (self.zipf_exponent, self.zipf_offset)
        if None in given and self.history.density.any():
            try:
                fit = fit_zipf(self.history.density, self.history.window)
                exponent, offset = fit.exponent, fit.offset
                rank_zero_info(
                    f"Features choose from now on: budgets follow (rank + {offset:.4g})^"
                    f"-{exponent:.4g}, as densities do with R^2 = {fit.r2:.3f}, "
                    f"{fit.r2_middle:.3f} in the middle ranks"
                )
            except ZipfFitError as error:
                rank_zero_warn(f"Budgets follow s={exponent}, q={offset}: {error}")
        return (
            exponent if self.zipf_exponent is None else self.zipf_exponent,
            offset if self.zipf_offset is None else self.zipf_offset,
        )

    def _first_phase_is_over(self) -> bool:
        seen = int(self.history.tokens_seen)
        if self.mutual_choice_tokens is not None:
            return seen >= self.mutual_choice_tokens
        if self.mutual_choice_share == 0:
            return True
        over = self.share_is_over(self.mutual_choice_share)
        return seen >= self.history.dead_after_tokens if over is None else over

    def _is_enough(self, tokens: int) -> bool:
        least = self.min_matches * self.n_features if self.budgets == "zipf" else self.k
        return self.k * tokens >= least

    def _require_enough(self, tokens: int) -> None:
        total = self.k * tokens
        if not self._is_enough(tokens):
            batches = self.layout.ranks.size if self.scope == "local" else 1
            needed = math.ceil(self.min_matches * self.n_features / self.k) * batches
            raise UsageError(
                f"k={self.k} matches for each of {tokens} tokens cannot give each of "
                f"n_features={self.n_features} features min_matches={self.min_matches}: "
                f"batch_size={needed} or min_matches={total / self.n_features:.3g} can"
            )

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Move each threshold towards the one that as many tokens pass as the budget allows."""
        ranks = self.layout.ranks
        if not self.choosing:
            super().observe(scores, choice)
            return
        if choice.passing is None:
            raise TypeError("a choice by features must count the tokens that pass thresholds")
        budgets = self.budgets_for(ranks.count(scores, scores.device)).to(self.threshold)
        if self.threshold.isnan().any():  # features choose from the start
            self.threshold.copy_(self._midpoints(scores, budgets))
            return
        # In proportion, because scores have no unit of their own. An average over the batches in
        # which a feature had a match, say, would let one with less than one a batch fire too often.
        passing = ranks.all_reduce(choice.passing)
        excess = ((passing - budgets) / budgets.clamp_min(1)).clamp(-1, 1)
        self.threshold.mul_((self.tracking * excess).exp()).clamp_min_(_LEAST)

    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return the thresholds that give every feature its budget on these tokens."""
        if not self.choosing:
            return super().calibrated(scaled)
        budgets = self.budgets_for(self.layout.ranks.count(scaled, scaled.device))
        return self._midpoints(self.scores(scaled), budgets)

    def _midpoints(self, scores: Scores, budgets: Tensor) -> Tensor:
        """Return thresholds (n_features,) that give each its budget, rounded, on all ranks."""
        ranks = self.layout.ranks
        counts = budgets.round().long().clamp(max=ranks.count(scores, scores.device))
        return midpoint_thresholds(scores, counts.to(scores.device), ranks=ranks)
