"""The page of a report: what is in it is what the report says, and it needs nothing else."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lightning_sae.report import page
from lightning_sae.report.collect import AFTER, BEFORE
from tests.report.made import FEATURES, LENGTH, ODD, made, texts


class Elements(HTMLParser):
    """Collects the text of each element, by its tag and id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[tuple[str, str], str] = {}
        self.links: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        self._open.append((tag, attributes.get("id", "")))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data


def data_in(html: str) -> dict[str, Any]:
    packed = Elements(html).texts["script", "data"]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def near(value):
    return pytest.approx(value, rel=5e-3)  # three digits


def test_it_needs_nothing_else_and_texts_end_no_element():
    html = page(made()[0])
    elements = Elements(html)
    assert elements.links == []
    assert set(re.findall(r"https?://\S+?(?=[\"')])", html)) == {"http://www.w3.org/2000/svg"}
    assert elements.texts["title", ""] == elements.texts["h1", "title"] == "An <SAE> & more"
    assert "{{" not in html
    assert ODD not in html
    assert ODD in data_in(html)["tokens"]


def test_figures_of_features():
    report, _ = made()
    data, firings = data_in(page(report)), report.firings
    assert data["read"] == firings.tokens
    assert data["state"] == report.state
    assert data["count"] == firings.count.tolist()
    assert data["mean"] == near(firings.mean.tolist())
    assert data["maximum"] == near(firings.top.value[:, 0].tolist())
    assert data["histogram"] == firings.histogram.tolist()
    assert data["binWidth"] == firings.bin_width.tolist()
    assert data["nearest"] == report.nearest[0].tolist()
    for feature in range(FEATURES):
        assert data["cosines"][feature] == near(report.nearest[1][feature].tolist())
        for kind in ("promoted", "demoted"):
            found = [data["tokens"][each] for each in data[kind][feature]]
            assert found == texts(getattr(report.lens, kind)[feature].tolist())
            logits = getattr(report.lens, f"{kind}_logits")[feature].tolist()
            assert data[f"{kind}Logits"][feature] == near(logits)


def test_a_model_without_logits_has_no_lists_of_tokens():
    assert "promoted" not in data_in(page(made(with_lens=False)[0]))


def test_examples_are_contexts_with_values():
    report, codes = made()
    data = data_in(page(report))
    for feature in range(FEATURES):
        shown = [*data["top"][feature], *(e for q in data["quarters"][feature] for e in q)]
        places = set()
        for example, (number, position, fires) in enumerate(shown):
            text = [data["tokens"][each] for each in data["contexts"][number]]
            (context,) = (i for i, row in enumerate(report.contexts.tolist()) if texts(row) == text)
            places.add((context, position))
            values = dict(zip(fires[::2], fires[1::2], strict=True))
            for offset in range(-BEFORE, AFTER + 1):
                at = position + offset
                value = codes[context, at, feature].item() if 0 <= at < LENGTH else 0.0
                assert values.get(offset, 0.0) == near(value)
            if example < len(data["top"][feature]):
                assert context == report.firings.top.place[feature, example] // LENGTH
        assert len(places) == len(shown)  # what the top shows is not shown again
        drawn = report.firings.sample.place[feature]
        drawn = {(place // LENGTH, place % LENGTH) for place in drawn.tolist() if place >= 0}
        assert drawn <= places


def test_only_contexts_of_examples_are_in_it():
    report, _ = made()
    used = {*report.top.context.tolist(), *report.sample.context.tolist()}
    assert len(data_in(page(report))["contexts"]) == len(used)
