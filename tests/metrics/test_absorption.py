import pytest
import torch
from torch.nn import functional

from lightning_sae.checks import UsageError
from lightning_sae.metrics import FeatureAbsorption
from lightning_sae.metrics import absorption as module
from tests.helpers.ddp import run_on_two
from tests.helpers.matches import matches_where

CONCEPTS, LEARNED, D_MODEL = 3, 10, 5


def sample(tokens: int, seed: int = 0):
    """Return learned directions, concepts, codes, activations and where concepts are."""
    draw = torch.Generator().manual_seed(seed)
    concepts = torch.randn(CONCEPTS, D_MODEL, generator=draw)
    learned = torch.randn(LEARNED, D_MODEL, generator=draw)
    learned[:CONCEPTS] += 3 * concepts
    codes = (2 * torch.rand(tokens, LEARNED, generator=draw) - 1).relu()
    x = codes @ functional.normalize(learned, dim=1)
    x += 0.3 * torch.randn(tokens, D_MODEL, generator=draw)
    return learned, concepts, codes, x, torch.rand(tokens, CONCEPTS, generator=draw) < 0.6


def of_one(direction, learned, codes, x) -> tuple[bool, float]:
    """SAEBench's two scores of one token, as its `calculate_absorption` goes about them."""
    direction = direction / direction.norm()
    cosines = functional.cosine_similarity(learned, direction.unsqueeze(0), dim=1).tolist()
    main = max(range(len(cosines)), key=cosines.__getitem__)
    projections = [code * cosine for code, cosine in zip(codes.tolist(), cosines, strict=True)]
    there = float(x @ direction)

    top = max(range(len(projections)), key=projections.__getitem__)
    full = codes[main] == 0 and cosines[top] >= 0.025 and there >= 0
    full = bool(full and projections[top] / there >= 0.4)

    absorbers = [
        value
        for j, value in enumerate(projections)
        if j != main and cosines[j] >= 0.1 and value > 0
    ]
    total = sum(sorted(absorbers)[-3:])
    if projections[main] >= there or total / there < 0.4:
        return full, 0.0
    if projections[main] <= 0:
        return full, 1.0
    part = min(total, there - projections[main])
    return full, min(max(part / (part + projections[main]), 0.0), 1.0)


def by_hand(learned, concepts, codes, x, there) -> dict[str, float]:
    means = []
    for number, direction in enumerate(concepts):
        tokens = there[:, number].nonzero().squeeze(1).tolist()
        scores = [of_one(direction, learned, codes[token], x[token]) for token in tokens]
        means.append(torch.tensor(scores, dtype=torch.float64).mean(0))
    absorption, fraction = torch.stack(means).mean(0).tolist()
    return {"absorption": absorption, "absorption_fraction": fraction}


def update(metric, codes, x, there) -> None:
    metric.update(matches_where(codes, codes > 0), x, matches_where(there.float(), there))


def numbers(metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("at_once", [1 << 22, 30])
@pytest.mark.parametrize("sizes", [[400], [150, 0, 250]])
def test_figures_are_those_of_the_definition(monkeypatch, at_once, sizes):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    learned, concepts, codes, x, there = sample(400)
    metric = FeatureAbsorption(learned, concepts)
    for part in zip(codes.split(sizes), x.split(sizes), there.split(sizes), strict=True):
        update(metric, *part)
    expected = by_hand(learned, concepts, codes, x, there)
    assert min(expected.values()) > 0.01
    assert numbers(metric) == pytest.approx(expected)


def test_the_truth_absorbs_nothing():
    _, concepts, _, _, there = sample(100)
    codes = there.float()
    directions = functional.normalize(concepts, dim=1)
    metric = FeatureAbsorption(directions, concepts)
    update(metric, codes, codes @ directions, there)
    assert numbers(metric)["absorption"] == 0


def test_a_feature_that_stands_in_for_a_silent_one_is_seen():
    general, special = torch.eye(4)[0], torch.eye(4)[1]
    learned = torch.stack([general, general + special, torch.eye(4)[2]])
    metric = FeatureAbsorption(learned, general.unsqueeze(0))
    codes = torch.tensor([[1.0, 0, 0], [0, 2**0.5, 0], [0, 0, 1], [0.5, 0.5 * 2**0.5, 0]])
    x = torch.stack([general, general + special, torch.eye(4)[2] - general, general])
    there = torch.tensor([[True], [True], [False], [True]])
    update(metric, codes, x, there)
    assert metric.main.tolist() == [0]
    # Of three tokens one is left to the special feature, and one is shared in halves.
    assert numbers(metric) == pytest.approx({"absorption": 1 / 3, "absorption_fraction": 0.5})


def test_concepts_that_were_never_there_do_not_count():
    learned, concepts, codes, x, there = sample(60)
    metric, all_of_them = FeatureAbsorption(learned, concepts[:2]), there[:, :2]
    update(metric, codes, x, all_of_them)
    other = FeatureAbsorption(learned, concepts)
    update(other, codes, x, there & torch.tensor([True, True, False]))
    assert numbers(metric) == pytest.approx(numbers(other))
    none = FeatureAbsorption(learned, concepts)
    update(none, codes, x, there & False)
    assert all(value.isnan() for value in none.compute().values())


def test_shapes_that_do_not_fit_are_refused():
    learned, concepts, codes, x, there = sample(6)
    with pytest.raises(UsageError, match=r"shapes \(10, 5\) and \(3, 4\)"):
        FeatureAbsorption(learned, concepts[:, :4])
    with pytest.raises(UsageError, match=r"of shapes \(6, 9\) and \(6, 3\) must be those of 6"):
        update(FeatureAbsorption(learned, concepts), codes[:, :9], x, there)


def figures_of_rank(rank: int) -> dict[str, float]:
    learned, concepts, *rest = sample(80)
    part = [slice(0, 21), slice(21, None)][rank]
    metric = FeatureAbsorption(learned, concepts)
    update(metric, *(each[part] for each in rest))
    return numbers(metric)


def test_two_ranks_measure_what_one_does():
    expected = by_hand(*sample(80))
    for found in run_on_two(figures_of_rank):
        assert found == pytest.approx(expected)
