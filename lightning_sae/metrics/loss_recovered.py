"""What splicing the reconstruction into the language model costs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.metrics.runs import Runs, cross_entropy, kept_and_scored
from lightning_sae.numerics import ratio, widest_float
from lightning_sae.residual_stream import ResidualStream


class AblatedLosses(NamedTuple):
    """Cross-entropies of the ablated model, in nats, summed over a batch's scored positions."""

    zero: Tensor
    mean: Tensor


_TOTALS = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")
LEAST_COST: Final = 0.01
"""Nats a token by which an ablation has to change the loss for a share of it to mean something."""


class LossRecovered(TotalsMetric):
    r"""Share of the language model's loss that the reconstruction preserves.

    .. math:: (L_{ablated} - L_{spliced}) / (L_{ablated} - L_{clean})

    where L is the cross-entropy of the next token, in nats: with the model as it is (clean), with
    the reconstruction spliced in, and with the activation ablated to zero or to its mean. 1 means
    that nothing was lost, 0 that the ablation does as well. In a residual stream, zeros destroy the
    model and nearly everything scores close to 1 against them: the mean, or the plain difference
    `delta_ce`, tells dictionaries apart. Where an ablation changes the loss by less than 0.01
    nats a token there is nothing to recover, and the share is NaN: it would be anything.

    Only kept positions are edited, and only they are scored: the activation of position t counts
    with the prediction of token t + 1, whatever that token is. The last position of a context is
    edited if it is kept, but has no next token and is not scored. All averages are over scored
    positions.

    An update runs the model four times, or twice where it is given what ablation costs, and holds
    the logits of two runs at most. Each run is shorter with the states at hand. ``compute``
    returns a dictionary, so log it with ``self.log_dict(metric.compute())`` and `reset` by hand, or
    put the metric in a `MetricCollection`. All values are NaN before the first scored position.

    Args:
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Example:
        >>> class Bigrams:  # a "model" whose activations are its logits
        ...     def replace(self, input_ids, edit):
        ...         return edit(3 * torch.eye(2)[input_ids].flip(-1))  # after 0 comes 1, after 1, 0
        >>> metric = LossRecovered()
        >>> input_ids = torch.tensor([[0, 1, 0, 1]])
        >>> kept = torch.ones_like(input_ids, dtype=torch.bool)
        >>> metric.update(Bigrams(), input_ids, lambda x: x / 2, kept, torch.tensor([1.5, 1.5]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'loss_recovered_zero': 0.7629, 'loss_recovered_mean': 0.7629, 'delta_ce': 0.1528,
         'kl': 0.0817, 'ce_clean': 0.0486, 'ce_spliced': 0.2014, 'ce_zero': 0.6931,
         'ce_mean': 0.6931}
    """

    ce_clean: Tensor
    ce_spliced: Tensor
    ce_zero: Tensor
    ce_mean: Tensor
    kl: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _TOTALS:
            self.add_total(name, dtype=torch.float64)
        self.add_total("tokens")

    @torch.no_grad()
    def update(
        self,
        residual_stream: ResidualStream,
        input_ids: Tensor,
        reconstruct: Callable[[Tensor], Tensor],
        kept: Tensor,
        mean: Tensor,
        *,
        attention_mask: Tensor | None = None,
        states: Tensor | None = None,
        ablated: AblatedLosses | None = None,
    ) -> None:
        """Run the model on a batch of contexts, clean, spliced and twice ablated.

        Args:
            residual_stream: Where the dictionary was trained; whatever has its `replace` will do.
            input_ids: Token ids, shape (contexts, length).
            reconstruct: Maps activations (tokens, d_model) to reconstructions of that shape, such
                as an autoencoder in `eval()` mode.
            kept: True where the activation is edited, shape (contexts, length).
            mean: Mean activation, shape (d_model,).
            attention_mask: 1 for a token, 0 for padding, shape (contexts, length); padding is
                neither edited nor scored, nor is what precedes it. None: no padding.
            states: What `residual_stream.read` returned for these contexts, which makes for shorter
                runs. None: not known.
            ablated: What `ablated_losses` returned for the same arguments. None: not known.

        Raises:
            ValueError: If a shape is not as above, kept is not boolean, or the model does not
                predict tokens from those before them alone.
        """
        kept, scored = kept_and_scored(input_ids, kept, attention_mask)
        if not scored.any():
            return
        if not getattr(residual_stream, "is_causal_language_model", True):
            name = type(residual_stream.model).__name__
            raise UsageError(f"{name} does not predict tokens from those before them alone")
        run = Runs(residual_stream, input_ids, kept, attention_mask, states)
        clean = run(lambda x: x)
        spliced = run(reconstruct)
        kl = _divergence(clean, spliced, scored)
        ce_clean = cross_entropy(clean, input_ids, scored)
        ce_spliced = cross_entropy(spliced, input_ids, scored)
        del clean, spliced  # before the next logits
        if ablated is None:
            known = {"attention_mask": attention_mask, "states": states}
            ablated = ablated_losses(residual_stream, input_ids, kept, mean, **known)
        self.add_to_totals(
            ce_clean=ce_clean,
            ce_spliced=ce_spliced,
            ce_zero=ablated.zero,
            ce_mean=ablated.mean,
            kl=kl,
            tokens=scored.sum(),
        )

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss_recovered_zero``, ``loss_recovered_mean``, and the following in nats.

        ``delta_ce`` (spliced less clean), ``kl`` (mean Kullback-Leibler divergence of the spliced
        from the clean predictions), ``ce_clean``, ``ce_spliced``, ``ce_zero`` and ``ce_mean``.
        """
        return _loss_recovered_compute({name: getattr(self, name) for name in _TOTALS}, self.tokens)


@torch.no_grad()
def ablated_losses(
    residual_stream: ResidualStream,
    input_ids: Tensor,
    kept: Tensor,
    mean: Tensor,
    *,
    attention_mask: Tensor | None = None,
    states: Tensor | None = None,
) -> AblatedLosses:
    """Run the model on a batch of contexts, twice ablated. No dictionary plays a part in it.

    Args:
        residual_stream: As in `LossRecovered.update`, and so are the others.
        input_ids: Token ids, shape (contexts, length).
        kept: True where the activation is edited, shape (contexts, length).
        mean: Mean activation, shape (d_model,).
        attention_mask: 1 for a token, 0 for padding, shape (contexts, length). None: no padding.
        states: What `residual_stream.read` returned for these contexts. None: not known.

    Raises:
        ValueError: If a shape is not as above, or kept is not boolean.
    """
    kept, scored = kept_and_scored(input_ids, kept, attention_mask)
    run = Runs(residual_stream, input_ids, kept, attention_mask, states)
    return AblatedLosses(
        zero=cross_entropy(run(torch.zeros_like), input_ids, scored),
        mean=cross_entropy(run(lambda x: _rows_of(mean, like=x)), input_ids, scored),
    )


def loss_recovered(
    input_ids: Tensor, kept: Tensor, *, clean: Tensor, spliced: Tensor, zero: Tensor, mean: Tensor
) -> dict[str, Tensor]:
    """Compute from logits what `LossRecovered` computes from a model.

    Args:
        input_ids: Token ids, shape (contexts, length).
        kept: True where the activation was edited, bool, shape (contexts, length).
        clean: Logits of the model as it is, shape (contexts, length, vocabulary), as the others.
        spliced: Logits with the reconstructions spliced in.
        zero: Logits with the activations set to zero.
        mean: Logits with the activations set to their mean.

    Returns:
        The dictionary of `LossRecovered.compute`.

    Raises:
        ValueError: If input_ids and kept do not both have shape (contexts, length), or kept is not
            boolean.

    Example:
        >>> input_ids, kept = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
        >>> clean = torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
        >>> zero, mean = 0 * clean, 0.5 * clean
        >>> values = loss_recovered(
        ...     input_ids, kept, clean=clean, spliced=0.75 * clean, zero=zero, mean=mean
        ... )
        >>> values["loss_recovered_zero"], values["loss_recovered_mean"]
        (tensor(0.9549), tensor(0.7202))
    """
    _, scored = kept_and_scored(input_ids, kept)
    logits = {"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_mean": mean}
    totals = {name: cross_entropy(each, input_ids, scored) for name, each in logits.items()}
    totals["kl"] = _divergence(clean, spliced, scored)
    return _loss_recovered_compute(totals, scored.sum())


def _loss_recovered_compute(totals: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    clean, spliced = totals["ce_clean"], totals["ce_spliced"]

    def share(ablated: Tensor) -> Tensor:
        means_something = (ablated - clean).abs() >= LEAST_COST * tokens
        return ratio(ablated - spliced, ablated - clean).where(means_something, torch.nan)

    return {
        "loss_recovered_zero": share(totals["ce_zero"]),
        "loss_recovered_mean": share(totals["ce_mean"]),
        "delta_ce": ratio(spliced - clean, tokens),
        "kl": ratio(totals["kl"], tokens),
    } | {name: ratio(totals[name], tokens) for name in _TOTALS if name != "kl"}


def _rows_of(mean: Tensor, *, like: Tensor) -> Tensor:
    if mean.shape != like.shape[-1:]:
        raise UsageError(
            f"mean of shape {tuple(mean.shape)}: activations need (d_model={like.shape[-1]},)"
        )
    return mean.to(like).expand_as(like)


def _divergence(clean: Tensor, spliced: Tensor, scored: Tensor) -> Tensor:
    total = torch.zeros((), dtype=widest_float(clean.device), device=clean.device)
    # One context at a time: log probabilities of a batch are larger than its logits.
    for *pair, here in zip(clean, spliced, scored, strict=True):
        log_p, log_q = (rows[here].log_softmax(-1, dtype=torch.float32) for rows in pair)
        total += (log_p.exp() * (log_p - log_q)).sum(dtype=total.dtype)
    return total
