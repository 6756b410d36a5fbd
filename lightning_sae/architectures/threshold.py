"""What architectures that choose over the batch share: thresholds that replace the batch.

Source of the idea: Bussmann et al. 2024 (BatchTopK, arXiv 2412.06410), who average the smallest
chosen activation. How Ayonrinde 2024 evaluates without a batch is not known to us.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sae.allocation import (
    Choice,
    Importance,
    RankDiscount,
    mutual_choice,
    threshold_choice,
)
from lightning_sae.callbacks.calibrate_thresholds import calibration
from lightning_sae.checks import UsageError, require_choice, require_k, require_not_negative
from lightning_sae.core.gate import Gate, require_plain
from lightning_sae.core.input_scaling import NormalizeInputs
from lightning_sae.core.loading import require_finite
from lightning_sae.host_copy import HostCopy
from lightning_sae.matches import Matches
from lightning_sae.metrics import FractionOfVarianceUnexplained
from lightning_sae.parallel import Ranks
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.selection import Scores

Scope = Literal["global", "local"]
"""Which tokens are chosen from together, under data parallelism:

* `global`: those of all ranks, so that the number of ranks does not show;
* `local`: those of each rank by itself. It saves six or seven small messages a batch, but ranks can
  no longer share a budget by need, and the result depends on their number.
"""


class ThresholdSAE(SparseAutoencoder):
    """An architecture that encodes each token by thresholds, which it learns from batches.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        k: Expected matches per token, 1 to n_features.
        normalize_inputs: `lightning_sae.core.input_scaling.NormalizeInputs`. With `average`, the
            paper's as far as is known, long tokens get more matches, and reconstruction is worse.
        importance: What pairs are ranked by: `lightning_sae.allocation.Importance`.
        rank_discount: How fast a token's matches beyond its k-th count for less: its r-th by
            `(k / r) ** rank_discount`, as in `lightning_sae.allocation.RankDiscount`. Ours, and
            better: 0 ranks by scores alone, as the paper does and BatchTopK, and is all that other
            libraries know by themselves; `without_discount` gets there from a trained SAE.
        scope: Under data parallelism, whether all ranks' tokens share the budget, or each rank has
            its own: `lightning_sae.architectures.threshold.Scope`.
        options: Those of `lightning_sae.SparseAutoencoder`.

    Attributes:
        averaging: Weight of the past, a batch, in the running average. The threshold falls while
            dictionaries improve, and a long average lags behind it: it would fire too rarely.
        threshold: Running average of what each training batch was cut at, float32, NaN until the
            first one: 0-d, or one a feature. In the units of the scores: those of scaled
            activations for affinities, none for `token_norm`.

    Raises:
        ValueError: If a setting is out of range.
    """

    averaging = 0.9
    threshold_per_feature: ClassVar[bool] = False
    threshold: Tensor
    _cuts: tuple[Tensor, Tensor] | None = None  # what the last two batches were cut at

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        normalize_inputs: NormalizeInputs = "token",
        importance: Importance = "affinity",
        rank_discount: float = 1.0,
        scope: Scope = "global",
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_features, normalize_inputs=normalize_inputs, **options)
        require_k(k, n_features)
        require_choice(importance=importance, of=get_args(Importance))
        require_choice(scope=scope, of=get_args(Scope))
        require_not_negative(rank_discount=rank_discount)
        self.k = k
        self.importance = importance
        self.rank_discount = rank_discount
        self.scope = scope
        self._unknown = HostCopy()  # whether a threshold is
        shape = (n_features,) if self.threshold_per_feature else ()
        self.register_buffer("threshold", torch.full(shape, torch.nan, dtype=torch.float32))

    @property
    def discount(self) -> RankDiscount | None:
        """What matches of a token beyond its k-th count for; None: as much as all others."""
        return RankDiscount(self.k, self.rank_discount) if self.rank_discount else None

    @property
    def has_thresholds(self) -> bool:
        """Whether all thresholds have been set."""
        return not self._unknown.read(lambda: self.threshold.isnan().any(), self.threshold)

    def _note_thresholds(self) -> None:
        """Have the next step know whether there are thresholds, once this one has moved them."""
        self._unknown.send(self.threshold.isnan().any(), self.threshold)

    @property
    def choosing_ranks(self) -> Ranks | None:
        """The ranks whose tokens are chosen from together; None where each chooses by itself."""
        return None if self.scope == "local" else self.layout.ranks

    def batch_tokens(self, rows: Scores | Tensor) -> int:
        """Return how many tokens are chosen from together: those of all ranks, or of this one."""
        ranks = self.choosing_ranks
        return len(rows) if ranks is None else ranks.count(rows, rows.device)

    def choose_by_batch(self, scores: Scores) -> Choice:
        """Match the k * tokens pairs of largest score among all that are chosen from together."""
        guess = None
        if self._cuts is not None:
            # Cuts fall while dictionaries improve. Without influence on the choice, so not saved.
            before, last = self._cuts
            margin = (2 * (last - before).abs() + 0.03 * last).minimum(0.2 * last)
            guess = (last - margin).nan_to_num(0.0).to(scores.device)
        budget = self.k * self.batch_tokens(scores)
        return Choice(
            mutual_choice(scores, budget, guess, discount=self.discount, ranks=self.choosing_ranks)
        )

    def batch_threshold(self, chosen: Matches) -> Tensor:
        """Return the smallest chosen score of a batch, or worth, 0-d.

        Zero if nothing was positive, and NaN if there are no tokens.
        """
        ranks, tokens = self.layout.ranks, chosen.shape[0]
        scores = self._worth(chosen)
        smallest = scores.min() if len(chosen) else scores.new_tensor(torch.inf)
        some = torch.full_like(smallest, min(1, tokens))
        if self.scope == "global":
            both = ranks.all_reduce(torch.stack([smallest, 1 - some]), "min")
            return both[0].where(both[0].isfinite(), 0).where(both[1] == 0, torch.nan)
        smallest = smallest.where(smallest.isfinite(), 0)
        both = ranks.all_reduce(torch.stack([smallest, some]))
        return both[0] / both[1]

    def _worth(self, chosen: Matches) -> Tensor:
        """Return what the batch ranked its choice by, (matches,): of a token, the largest."""
        if self.discount is None:
            return chosen.value
        return self.discount(chosen.token, chosen.value)

    def configure_callbacks(self) -> list[Callback]:
        """Return also what calibrates thresholds after the last step, unless the Trainer has it."""
        return super().configure_callbacks() + calibration(self.trainer)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the threshold to what gives exactly k matches a token on these activations.

        Training keeps thresholds near it; this is for the end of training, where a Trainer's runs
        have `CalibrateThresholds` call it.

        Args:
            x: Activations, shape (tokens, d_model), of which those count that training does not
                leave out. Under data parallelism, those of this rank; the threshold is that of all
                together.

        Raises:
            ValueError: If x is not d_model wide, or there are no tokens.
            FloatingPointError: If affinities are NaN or infinite.
        """
        x = self.ordinary(x)
        if not self.layout.ranks.count(x, x.device):
            raise UsageError("calibrate takes activations of at least one token")
        self.threshold.copy_(self.calibrated(self.scaled(x)))

    def without_discount(self, x: Tensor) -> Self:
        """Return a copy whose codes are the affinities above thresholds: what others can load.

        It reconstructs worse. Thresholds are set anew, so that there are k matches a token again.

        Args:
            x: Activations to calibrate them on, shape (tokens, d_model), as in `calibrate`.
        """
        arguments: dict[str, Any] = {**self.hparams, "rank_discount": 0.0}
        copy = type(self)(**arguments)
        copy.load_state_dict(self.state_dict())
        copy.to(self.threshold.device).calibrate(x)
        copy.eval()
        width = getattr(self, "d_target", self.d_model)  # a transcoder's target is beside its input
        whole = FractionOfVarianceUnexplained(width).to(x.device)
        copy.record = {name: of for name, of in self.record.items() if name != "measured"}
        copy.record["measured"] = {
            "tokens_seen": int(self.tokens_seen),
            "l0": len(copy.match(x)) / len(x),
            "fvu": float(whole(copy(x)[:, -width:], x[:, -width:])),
        }
        return copy

    def calibrated(self, scaled: Tensor) -> Tensor:
        """Return `threshold` as all ranks' scaled activations (tokens, d_model) would have it.

        By default the midpoint of the last chosen and first rejected score of all pairs, 0-d.
        """
        ranks = self.layout.ranks
        tokens = ranks.count(scaled, scaled.device)
        budget, everything = self.k * tokens, tokens * self.n_features
        guess = 0.9 * float(self.threshold.mean())  # NaN before the first batch
        # One more than the budget: the first that is rejected.
        chosen = mutual_choice(
            self.scores(scaled),
            min(budget + 1, everything),
            guess if guess > 0 else None,
            discount=self.discount,
            ranks=ranks,
        )
        smallest = self._worth(chosen).sort().values[:2]
        last_two = torch.cat(ranks.all_gather(smallest)).sort().values[:2]
        if ranks.count(chosen.token, scaled.device) > budget:
            return last_two.mean()
        return last_two[:1].sum() / 2  # nothing positive was rejected

    def choose_per_token(self, scores: Scores) -> Matches:
        """Match every pair whose score is above the threshold.

        Raises:
            ValueError: If no training batch has set the threshold.
        """
        if not self.has_thresholds:
            raise UsageError(
                f"threshold of {type(self).__name__} is not calibrated: "
                "train on at least one batch, or load a trained checkpoint, before inference"
            )
        expected = self.k * len(scores)
        return threshold_choice(scores, self.threshold, discount=self.discount, expected=expected)

    def gate(self) -> Gate:
        """Return that affinities above the threshold are the code.

        Raises:
            UsageError: If pairs are ranked by something else than a multiple of the affinity.
        """
        require_plain(self.importance)
        relative = self.importance == "token_norm"
        return Gate(threshold=self.threshold, relative=relative, discount=self.discount)

    def observe(self, scores: Scores, choice: Choice) -> None:
        """Move the threshold towards what this batch was cut at."""
        chosen = choice.matches
        seen = self.batch_threshold(chosen).float()
        nothing, before = seen.isnan(), self._cuts[1] if self._cuts else seen
        own = self.scope == "local" and len(chosen) > 0
        last = (self._worth(chosen).min() if own else seen).float().where(~nothing, before)
        self._cuts = before, last
        moved = self.threshold.lerp(seen, 1 - self.averaging)
        moved = seen.where(self.threshold.isnan(), moved)
        self.threshold.copy_(self.threshold.where(nothing, moved))
        self._note_thresholds()

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse also thresholds that are not finite, unless no batch has set them: all NaN."""
        super().check_state(state)
        if "threshold" in state and not bool(state["threshold"].isnan().all()):
            require_finite(state, "threshold", least=0)

    def threshold_statistics(self) -> dict[str, Tensor]:
        """Return the mean threshold."""
        return {"threshold": self.threshold.mean()}
