"""From an SAE and its data to the files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from lightning_sae.checks import UsageError, require_at_least
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.blocks import first_inputs, stacked
from lightning_sae.data.stream import HeldOutBatches
from lightning_sae.model_card import ACTIVATIONS, FIGURES, SETTINGS
from lightning_sae.report.collect import collect
from lightning_sae.report.contents import FeatureReport
from lightning_sae.report.logit_lens import LogitLens, logit_lens
from lightning_sae.report.nearest import nearest_features
from lightning_sae.report.page import page
from lightning_sae.report.table import write_tables
from lightning_sae.report.token_texts import token_texts
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.sae import SparseAutoencoder
from lightning_sae.several_sites import SeveralSites

__all__ = ["Split", "report_of", "write_report"]

Split = Literal["held_out", "train"]


def report_of(
    sae: SparseAutoencoder,
    data: ActivationDataModule,
    *,
    tokens: int = 250_000,
    split: Split = "held_out",
) -> FeatureReport:
    """Return what there is to know of an SAE's features, from one pass over text.

    Args:
        sae: Trained; where it is, the language model is run too.
        data: The activations it was trained on.
        tokens: Tokens to read, in whole contexts; fewer if there is not as much text.
        split: The text to read: what was held out, or what was trained on.

    Raises:
        UsageError: If there is no text, or `tokens` is less than a context.
    """
    length = data.positions_per_input
    require_at_least(length, tokens=tokens)
    inputs = data.train_inputs() if split == "train" else data.held_out_inputs()
    chosen = first_inputs(inputs, tokens // length)
    if not chosen:
        raise UsageError(f"{data.source}: split={split!r} has no context of {length} tokens")
    if len(chosen) < tokens // length:
        rank_zero_info(
            f"{data.source}: split={split!r} has {len(chosen) * length:,} tokens to read"
        )
    contexts = stacked(chosen, data.source, data.noun)
    read = data.model.reader(sae.device, *data.cache_settings)
    batches = HeldOutBatches(
        inputs=contexts,
        kept=data.kept,
        read=lambda ids: read(ids, data.kept(ids), split == "held_out"),  # as a cache notes it
        model_batch_size=data.model_batch_size,
        source=f"{data.model}, {data.noun} of the report",
    )
    directions = sae.W_dec.detach()
    lens = _lens(data.model.residual_stream(sae.device), directions)  # before what takes long
    firings = collect(sae, tqdm(batches, desc="Reading", unit="batch"), device=sae.device)
    nearest, cosines = nearest_features(directions)
    return FeatureReport(
        title=f"{type(sae).__name__} on {_where(data)} of {Path(data.model_name).name}",
        about={
            "Settings": _named(SETTINGS, dict(sae.hparams)),
            "Trained on": _named(ACTIVATIONS, sae.record.get("trained_on", {})),
            "Measured as it was trained": _named(FIGURES, sae.record.get("measured", {})),
            "Read for this report": {
                "text": data.text,
                "split": split,
                "tokens": firings.tokens,
            },
        },
        firings=firings,
        contexts=contexts,
        text_of=partial(token_texts, data.model.tokenizer(length)),
        lens=lens,
        nearest=(nearest.cpu(), cosines.cpu()),
    )


def write_report(report: FeatureReport, output: str | Path) -> list[Path]:
    """Write a report as a page, and as tables beside it.

    Args:
        report: What to write.
        output: The page, `report.html` say; beside it come `report.features.parquet` and
            `report.examples.parquet`. Files of these names are replaced.

    Returns:
        The three files.
    """
    output = Path(output)
    features, examples = (
        output.with_suffix(f".{name}.parquet") for name in ("features", "examples")
    )
    write_tables(report, features, examples)
    output.write_text(page(report), encoding="utf-8")
    return [output, features, examples]


def _lens(stream: ResidualStream | SeveralSites, directions: Tensor) -> LogitLens | None:
    """Return what directions do in a model's output; None if it has none, or no last block.

    They do something where they are in the residual stream, or are added to it.
    """
    last = stream.streams[-1] if isinstance(stream, SeveralSites) else stream  # a target
    if last.site not in ("resid_post", "mlp_out"):
        return None
    try:
        return logit_lens(last, directions) if last.is_causal_language_model else None
    except UsageError:  # its blocks cannot be told, and the layer was named by its path
        return None


def _where(data: ActivationDataModule) -> str:
    site = data.model.site
    return f"layer {data.model.layer}" + ("" if site == "resid_post" else f" ({site})")


def _named(names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by what they mean, of those that are known."""
    return {names[name]: values[name] for name in names if values.get(name) is not None}
