"""A report as one HTML file that needs nothing else: no server, no network, no library."""

from __future__ import annotations

import base64
import gzip
import html
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from lightning_sae.report.collect import AFTER, BEFORE
from lightning_sae.report.contents import QUARTERS, FeatureReport, Windows

__all__ = ["page", "page_data"]

FOLDER: Final = Path(__file__).parent


def page(report: FeatureReport) -> str:
    """Return the HTML."""
    text = json.dumps(page_data(report), separators=(",", ":"), allow_nan=False)
    # Nothing of the text can end the element that holds it.
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(report.title),
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "page.js").read_text(encoding="utf-8"),
        "data": packed,
    }
    for name, part in parts.items():
        template = template.replace(f"{{{{{name}}}}}", part)
    return template


def page_data(report: FeatureReport) -> dict[str, Any]:
    """Return what the page shows, as JSON has it.

    Tokens are numbers of `tokens`, the texts. An example is `[number of the context, position,
    [offset, value, ...]]`: how far from the position the feature fires, and its value there.
    """
    firings, law = report.firings, report.law
    token = {each: number for number, each in enumerate(report.texts)}
    used = torch.cat([report.top.context, report.sample.context]).unique()
    contexts = report.contexts[used]
    vocabulary = contexts.unique().tolist()
    missing = [each for each in vocabulary if each not in token]
    token |= {each: len(token) + number for number, each in enumerate(missing)}
    data: dict[str, Any] = {
        "title": report.title,
        "about": report.about,
        "read": firings.tokens,
        "law": law and [law.scale, law.exponent, law.offset],
        "tokens": [*report.texts.values(), *report.text_of(missing)],
        "contexts": [[token[each] for each in row] for row in contexts.tolist()],
        "window": [BEFORE, AFTER],
        "state": report.state,
        "count": firings.count.tolist(),
        "mean": _short(firings.mean),
        "maximum": _short(firings.top.value[:, 0]),
        "binWidth": firings.bin_width.tolist(),
        "histogram": firings.histogram.tolist(),
        "nearest": report.nearest[0].tolist(),
        "cosines": _short(report.nearest[1]),
        "top": _top(report, used),
        "quarters": _quarters(report, used),
    }
    if report.lens is not None:
        lens = report.lens
        for name, ids in (("promoted", lens.promoted), ("demoted", lens.demoted)):
            data[name] = [[token[each] for each in row] for row in ids.tolist()]
        data["promotedLogits"] = _short(lens.promoted_logits)
        data["demotedLogits"] = _short(lens.demoted_logits)
    return data


def _top(report: FeatureReport, used: Tensor) -> list[list[Any]]:
    """Return the top examples of each feature; `used` are the contexts on the page, ascending."""
    found: list[list[Any]] = [[] for _ in report.firings.count]
    for feature, example in zip(
        report.top.feature.tolist(), _examples(report.top, used), strict=True
    ):
        found[feature].append(example)
    return found


def _quarters(report: FeatureReport, used: Tensor) -> list[list[list[Any]]]:
    """Return the sample of each feature in quarters, without what the top shows already."""
    firings, sample = report.firings, report.sample
    shown = (firings.sample.place.unsqueeze(2) == firings.top.place.unsqueeze(1)).any(2)
    found: list[list[list[Any]]] = [[[] for _ in range(QUARTERS)] for _ in firings.count]
    where = zip(
        sample.feature.tolist(),
        report.sample_quarter.tolist(),
        shown[sample.feature, sample.rank].tolist(),
        _examples(sample, used),
        strict=True,
    )
    for feature, quarter, is_shown, example in where:
        if not is_shown:
            found[feature][quarter].append(example)
    return found


def _examples(windows: Windows, used: Tensor) -> list[list[Any]]:
    """Return the examples one after another."""
    fires: list[list[float]] = [[] for _ in windows.feature]
    row, column = windows.values.nonzero(as_tuple=True)
    values = _short(windows.values[row, column])
    for example, offset, value in zip(
        row.tolist(), (column - BEFORE).tolist(), values, strict=True
    ):
        fires[example] += [offset, value]
    context = torch.searchsorted(used, windows.context).tolist()
    return [list(each) for each in zip(context, windows.position.tolist(), fires, strict=True)]


def _short(values: Tensor) -> Any:
    """Return numbers as short as they need to be for a person, in lists of the same shape."""
    rounded = [float(f"{value:.3g}") for value in values.flatten().tolist()]
    return np.array(rounded).reshape(values.shape).tolist()
