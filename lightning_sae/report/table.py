"""A report as parquet, for others to build on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sae.report.collect import BEFORE
from lightning_sae.report.contents import FeatureReport, Windows

__all__ = ["example_table", "feature_table", "write_tables"]


def write_tables(report: FeatureReport, features: Path, examples: Path) -> None:
    """Write one table with a row a feature, and one with a row an example.

    Features: `feature`, `state` ("live", "dying", "dead"), `count`, `density`, `mean` and `maximum`
    of its values, their `histogram` in bins of `bin_width` from 0 on, `nearest` features and their
    `nearest_cosines`, and, where the model has logits, `promoted` and `demoted` tokens with
    `promoted_logits` and `demoted_logits`.

    Examples: `feature`, `kind` ("top" or "sample"), `quarter` of the sample (0 is the strongest;
    null for the top), `context` and `position` of the firing, its `value`, the `tokens` around it
    with their `token_ids` and the feature's `values` there, and at which of these it is, `firing`.

    Args:
        report: What to write.
        features: File of the first table.
        examples: File of the second table.
    """
    from pyarrow import parquet

    parquet.write_table(feature_table(report), features, compression="zstd")
    parquet.write_table(example_table(report), examples, compression="zstd")


def feature_table(report: FeatureReport) -> Any:
    """Return the first table of `write_tables`, as a `pyarrow.Table`."""
    import pyarrow as pa

    firings = report.firings
    columns: dict[str, Any] = {
        "feature": np.arange(len(firings.count), dtype=np.int32),
        "state": report.state,
        "count": firings.count.numpy(),
        "density": firings.density.numpy(),
        "mean": firings.mean.numpy(),
        "maximum": firings.top.value[:, 0].numpy(),
        "bin_width": firings.bin_width.numpy(),
        "histogram": _lists(firings.histogram),
        "nearest": _lists(report.nearest[0]),
        "nearest_cosines": _lists(report.nearest[1]),
    }
    if report.lens is not None:
        columns |= {
            "promoted": _texts(report, report.lens.promoted),
            "promoted_logits": _lists(report.lens.promoted_logits),
            "demoted": _texts(report, report.lens.demoted),
            "demoted_logits": _lists(report.lens.demoted_logits),
        }
    return pa.table(columns)


def example_table(report: FeatureReport) -> Any:
    """Return the second table of `write_tables`, as a `pyarrow.Table`: by feature, top ones first.

    Each kind begins with the strongest.
    """
    import pyarrow as pa

    both = [
        pa.table(_examples(report, report.top, "top", None)),
        pa.table(_examples(report, report.sample, "sample", report.sample_quarter)),
    ]
    return pa.concat_tables(both).sort_by("feature")


def _examples(
    report: FeatureReport, windows: Windows, kind: str, quarter: Tensor | None
) -> dict[str, Any]:
    import pyarrow as pa

    rows = len(windows.feature)
    inside = windows.token_ids >= 0
    return {
        "feature": windows.feature.to(torch.int32).numpy(),
        "kind": [kind] * rows,
        "quarter": pa.nulls(rows, pa.int8()) if quarter is None else quarter.to(torch.int8).numpy(),
        "context": windows.context.numpy(),
        "position": windows.position.to(torch.int32).numpy(),
        "value": windows.values[:, BEFORE].numpy(),
        "tokens": _texts(report, windows.token_ids, inside),
        "token_ids": _lists(windows.token_ids.to(torch.int32), inside),
        "values": _lists(windows.values, inside),
        "firing": inside[:, :BEFORE].sum(1, dtype=torch.int32).numpy(),
    }


def _lists(rows: Tensor, inside: Tensor | None = None) -> Any:
    """Return a column of lists, of those entries of each row, (rows, n), that are inside."""
    import pyarrow as pa

    inside = torch.ones_like(rows, dtype=torch.bool) if inside is None else inside
    return _cut(pa.array(rows[inside].numpy()), inside)


def _texts(report: FeatureReport, ids: Tensor, inside: Tensor | None = None) -> Any:
    """Return the same of token ids, as their texts."""
    import pyarrow as pa

    inside = torch.ones_like(ids, dtype=torch.bool) if inside is None else inside
    kinds, number = ids[inside].unique(return_inverse=True)
    texts = pa.array([report.texts[each] for each in kinds.tolist()], type=pa.string())
    return _cut(texts.take(pa.array(number.numpy())), inside)


def _cut(flat: Any, inside: Tensor) -> Any:
    """Return an array as one of lists, each as long as its row has entries that are inside."""
    import pyarrow as pa

    ends = inside.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return pa.ListArray.from_arrays(pa.array(torch.cat([ends.new_zeros(1), ends]).numpy()), flat)
