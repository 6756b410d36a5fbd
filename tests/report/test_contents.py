"""What a report says of features and their examples."""

import torch

from lightning_sae.report import FeatureReport, Firings
from lightning_sae.report.collect import AFTER, BEFORE, Examples
from tests.report.made import FEATURES, LENGTH, made, texts

WINDOW = BEFORE + 1 + AFTER


def test_windows_have_the_text_around_and_nothing_beyond_the_context():
    report, codes = made()
    for windows in (report.top, report.sample):
        for i in range(len(windows.feature)):
            context, position = int(windows.context[i]), int(windows.position[i])
            for j, at in enumerate(range(position - BEFORE, position + AFTER + 1)):
                inside = 0 <= at < LENGTH
                token = report.contexts[context, at] if inside else -1
                value = codes[context, at, windows.feature[i]] if inside else 0
                assert windows.token_ids[i, j] == token
                assert windows.values[i, j] == value


def test_quarters_are_equal_parts_of_each_sample_the_strongest_first():
    report, _ = made()
    for feature in range(FEATURES):
        mine = report.sample_quarter[report.sample.feature == feature]
        assert mine.tolist() == sorted(mine.tolist())
        sizes = mine.bincount(minlength=4)
        assert sizes.max() - sizes.min() <= 1


def firings(count: list[int], tokens: int) -> Firings:
    n = len(count)
    none = Examples(torch.full((n, 1), -1), torch.zeros(n, 1, WINDOW))
    zeros = torch.zeros(n)
    return Firings(tokens, torch.tensor(count), zeros, zeros[:, None].long(), zeros, none, none)


def report_of(count: list[int], tokens: int) -> FeatureReport:
    nothing = torch.zeros(len(count), 0)
    contexts = torch.zeros(1, LENGTH, dtype=torch.int64)
    return FeatureReport(
        "", {}, firings(count, tokens), contexts, texts, None, (nothing.long(), nothing)
    )


def test_features_are_dying_below_the_law_and_dead_where_they_never_fire():
    tokens = 1_000_000
    law = [int(tokens * 0.5 / (rank + 3)) for rank in range(1, 201)]
    report = report_of([0, *law, 300], tokens)  # the law has about 2,500 at the last ranks
    assert report.state == ["dead", *["live"] * 200, "dying"]


def test_where_too_few_features_fire_there_is_no_law():
    report = report_of([0, 5], 100)
    assert report.law is None
    assert report.state == ["dead", "live"]


def test_texts_are_of_all_tokens_that_are_shown():
    report, _ = made()
    shown = {*report.top.token_ids.flatten().tolist(), *report.lens.promoted.flatten().tolist()}
    assert shown - {-1} <= report.texts.keys()
    assert all(report.texts[each] == texts([each])[0] for each in report.texts)
