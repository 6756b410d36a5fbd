"""A report in the files from which Neuronpedia (https://neuronpedia.org) takes dashboards.

They are as SAEDashboard 0.8 has them, in its `NeuronpediaDashboardBatch`. Neuronpedia's own
`convert-saedashboard-to-neuronpedia-export.py` makes of them what can be imported there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightning_sae.report.contents import QUARTERS, FeatureReport
from lightning_sae.report.table import example_table, feature_table

__all__ = ["write_neuronpedia"]

FEATURES: Final = 256
"""Features a file."""
NOT_KNOWN: Final = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
"""What a report does not find out."""


def write_neuronpedia(
    report: FeatureReport, folder: str | Path, *, model_id: str, layer: int, source_set: str
) -> list[Path]:
    """Write `batch-0.json` and so on, of 256 features each.

    Top contexts are Neuronpedia's top activations, and the quarters of the sample its intervals.

    Args:
        report: What to write.
        folder: Where to. It is made, and must hold no batches yet.
        model_id: What Neuronpedia calls the model: as TransformerLens does.
        layer: The block that was read, from 0.
        source_set: What these SAEs are to be called there, without the layer.

    Returns:
        The files.

    Raises:
        FileExistsError: If there are such files already: one of another report would stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    features, examples = feature_table(report), example_table(report)
    of_feature = examples["feature"].to_numpy()
    paths = []
    for first in range(0, len(features), FEATURES):
        rows = features.slice(first, FEATURES).to_pylist()
        start, end = np.searchsorted(of_feature, (first, first + FEATURES))
        shown: dict[int, list[dict[str, Any]]] = {row["feature"]: [] for row in rows}
        for example in examples.slice(start, end - start).to_pylist():
            shown[example["feature"]].append(example)
        batch = {
            "model_id": model_id,
            "layer": layer,
            "sae_set": source_set,
            "sae_id_suffix": None,
            "features": [_dashboard(row, shown[row["feature"]], report) for row in rows],
        }
        paths.append(folder / f"batch-{first // FEATURES}.json")
        with paths[-1].open("x", encoding="utf-8") as file:
            json.dump(batch, file, ensure_ascii=False, allow_nan=False)
    return paths


def _dashboard(
    row: dict[str, Any], examples: list[dict[str, Any]], report: FeatureReport
) -> dict[str, Any]:
    """Return what SAEDashboard calls a feature."""
    used = len(np.trim_zeros(row["histogram"], "b"))
    contexts, length = report.contexts.shape
    return {
        "feature_index": row["feature"],
        "neg_str": row.get("demoted", []),
        "neg_values": _rounded(row.get("demoted_logits", [])),
        "pos_str": row.get("promoted", []),
        "pos_values": _rounded(row.get("promoted_logits", [])),
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": [row["bin_width"] * (i + 0.5) for i in range(used)],
        "freq_hist_data_bar_heights": row["histogram"][:used],
        "n_prompts_total": contexts,
        "n_tokens_in_prompt": length,
        "dataset": report.about["Read for this report"]["text"],
        "activations": _activations(examples),
        "vector": [],
    } | {name: [] for name in NOT_KNOWN}


def _activations(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return examples of one feature, the strongest group first."""
    groups: dict[int | None, list[dict[str, Any]]] = {}
    for example in examples:
        groups.setdefault(example["quarter"], []).append(example)
    found = []
    for quarter, group in groups.items():
        values = [example["value"] for example in group]
        limits = {"bin_min": -1.0, "bin_max": max(values), "bin_contains": -1.0}
        if quarter is not None:
            limits |= {"bin_min": min(values), "bin_contains": 1 / QUARTERS}
        found += [
            limits
            | {
                "tokens": example["tokens"],
                "values": _rounded(example["values"]),
                "qualifying_token_index": example["firing"],
            }
            for example in group
        ]
    return found


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
