"""What each feature fires on, against loops over dense codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae import Matches, TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.report import FiringCollector, Firings, collect
from lightning_sae.report.collect import AFTER, BEFORE
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations

FEATURES, TOP, SAMPLE = 4, 2, 3


def made(seed: int, contexts: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense codes with ties, (contexts, length, features), and which positions are kept."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-6, 4, (contexts, length, FEATURES), generator=draw) / 2
    kept = torch.rand(contexts, length, generator=draw) < 0.8
    return (codes * kept.unsqueeze(-1)).clamp_min(0), kept


def matches_of(codes: torch.Tensor, kept: torch.Tensor) -> Matches:
    rows = codes[kept]
    token, feature = rows.nonzero(as_tuple=True)
    return Matches(token, feature, rows[token, feature], tuple(rows.shape))


def collected(codes: torch.Tensor, kept: torch.Tensor, size: int) -> Firings:
    collector = FiringCollector(FEATURES, top=TOP, sample=SAMPLE)
    for first in range(0, len(codes), size):
        part = slice(first, first + size)
        collector.update(kept[part], matches_of(codes[part], kept[part]), first)
    return collector.result()


def window(codes: torch.Tensor, context: int, position: int, feature: int) -> list[float]:
    length = codes.shape[1]
    return [
        codes[context, at, feature].item() if 0 <= at < length else 0.0
        for at in range(position - BEFORE, position + AFTER + 1)
    ]


def assert_examples(examples, feature: int, places: list[int], codes: torch.Tensor) -> None:
    length = codes.shape[1]
    empty = examples.place.shape[1] - len(places)
    assert examples.place[feature].tolist() == places + [-1] * empty
    for rank, place in enumerate(places):
        expected = window(codes, place // length, place % length, feature)
        assert examples.values[feature, rank].tolist() == expected


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40), st.integers(1, 4))
def test_it_is_what_loops_find(seed: int, contexts: int, length: int, size: int):
    codes, kept = made(seed, contexts, length)
    found = collected(codes, kept, size)
    assert found.tokens == kept.sum()
    draw = torch.Generator().manual_seed(0)
    lots: dict[tuple[int, int], float] = {}  # of each firing, batch by batch, by feature and place
    for first in range(0, contexts, size):
        firings = [
            (feature, context * length + position)
            for feature in range(FEATURES)
            for context in range(first, min(contexts, first + size))
            for position in range(length)
            if codes[context, position, feature] > 0
        ]
        drawn = torch.rand(len(firings), generator=draw, dtype=torch.float64)
        lots |= dict(zip(firings, drawn.tolist(), strict=True))
    flat = codes.flatten(0, 1)
    for feature in range(FEATURES):
        places = [place for f, place in lots if f == feature]
        values = {place: flat[place, feature].item() for place in places}
        assert found.count[feature] == len(places)
        assert found.mean[feature] == pytest.approx(
            sum(values.values()) / max(1, len(places)), abs=1e-6
        )
        assert found.histogram[feature].sum() == len(places)
        peaks: dict[int, int] = {}  # of each context, the first of its highest values
        for place in places:
            best = peaks.setdefault(place // length, place)
            if values[place] > values[best]:
                peaks[place // length] = place
        top = sorted(peaks.values(), key=lambda place: (-values[place], place))[:TOP]
        assert_examples(found.top, feature, top, codes)
        luckiest = sorted(places, key=lambda place: -lots[feature, place])[:SAMPLE]
        sample = sorted(luckiest, key=lambda place: (-values[place], place))
        assert_examples(found.sample, feature, sample, codes)


def test_what_is_no_draw_does_not_depend_on_the_batches():
    codes, kept = made(0, 8, 20)
    one, other = collected(codes, kept, 8), collected(codes, kept, 3)
    assert torch.equal(one.histogram, other.histogram)
    assert torch.equal(one.top.place, other.top.place)
    assert torch.equal(one.top.values, other.top.values)


def test_a_match_of_value_0_is_no_firing():
    matches = Matches(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), (1, 2))
    collector = FiringCollector(2)
    collector.update(torch.ones(1, 1, dtype=torch.bool), matches, 0)
    assert collector.result().count.tolist() == [0, 1]
    assert collector.result().density.tolist() == [0, 1]


def test_an_sae_is_read_batch_by_batch():
    torch.manual_seed(0)
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    x, kept = activations(24), torch.ones(3, 8, dtype=torch.bool)
    sae.loss(x)
    batches = [
        {"activations": x[:16], "kept": kept[:2], "first": 0},
        {"activations": x[16:], "kept": kept[2:], "first": 2},
    ]
    found = collect(sae, batches, top=1)
    codes = sae.encode(x).detach()
    assert torch.equal(found.count, (codes > 0).sum(0))
    fires = found.count > 0
    assert torch.equal(found.top.value[fires, 0], codes.max(0).values[fires])
    assert torch.equal(found.top.place[fires, 0], codes.argmax(0)[fires])


def test_there_are_examples_to_keep():
    with pytest.raises(UsageError, match="top=0"):
        FiringCollector(2, top=0)
