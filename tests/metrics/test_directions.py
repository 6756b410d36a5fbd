import pytest
import torch
from torch.nn import functional

from lightning_sae.checks import UsageError
from lightning_sae.metrics import direction_statistics, largest_cosines


def directions(count, seed):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_largest_cosines_are_those_of_all_pairs():
    ours, others = directions(5000, 0), directions(30, 1)  # more than are compared at once
    table = functional.cosine_similarity(ours.unsqueeze(1), others, dim=2).abs()
    found, place = largest_cosines(ours, others)
    torch.testing.assert_close(found, table.max(1).values)
    torch.testing.assert_close(table[torch.arange(5000), place], found)


def test_neither_length_nor_sign_counts():
    true = directions(20, 0)
    scrambled = -3 * true[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    figures = direction_statistics(scrambled, true)
    expected = {"mmcs_true": 1, "mmcs_learned": 1, "uniqueness": 1, "unmatched_fraction": 0}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def test_what_was_not_found_shows_one_way_and_what_is_not_true_the_other():
    true = torch.eye(6)
    missing = direction_statistics(true[:4], true)
    assert missing["mmcs_true"].item() == pytest.approx(4 / 6)
    assert missing["mmcs_learned"] == missing["uniqueness"] == 1
    assert missing["unmatched_fraction"].item() == pytest.approx(2 / 6)
    spread = torch.full((2, 6), 1.0)
    wrong = direction_statistics(torch.cat([true, spread]), true)
    assert wrong["mmcs_true"] == 1
    assert wrong["mmcs_learned"].item() == pytest.approx((6 + 2 / 6**0.5) / 8)
    assert wrong["uniqueness"].item() == pytest.approx(6 / 8)


@pytest.mark.parametrize(
    ("learned", "true", "said"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"shapes \(3, 4\) and \(3, 5\) must both be"),
        (torch.ones(0, 4), torch.ones(3, 4), "at least one direction"),
    ],
)
def test_mistakes_are_told(learned, true, said):
    with pytest.raises(UsageError, match=said):
        direction_statistics(learned, true)
