"""What an SAE is to others: which affinities of a token are its code."""

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, StandardSAE, TopKSAE, UsageError
from lightning_sae.allocation import RankDiscount
from lightning_sae.core.gate import Gate, require_plain


def test_every_architecture_says_what_its_codes_are():
    assert StandardSAE(8, 16).gate() == Gate()
    assert TopKSAE(8, 16, 3).gate() == Gate(k=3)
    for kind, shape in ((MutualChoiceSAE, ()), (FeatureChoiceSAE, (16,))):
        options = {"mutual_choice_tokens": 10} if shape else {}
        sae = kind(8, 16, 3, rank_discount=0, **options)
        sae.loss(torch.randn(64, 8))
        gate = sae.gate()
        assert gate.threshold is sae.threshold
        assert gate.threshold.shape == shape
        assert not gate.relative


def test_thresholds_of_scores_by_length_are_relative():
    assert MutualChoiceSAE(8, 16, 3, importance="token_norm", rank_discount=0).gate().relative


def test_codes_are_what_is_above_the_cut():
    """In a batch of any shape, against a loop over the places of a token's affinities."""
    generator = torch.Generator().manual_seed(0)
    affinities = torch.randn(3, 20, 30, generator=generator) + 0.5
    thresholds = torch.rand(30, generator=generator)
    thresholds[:3] = 0
    length = torch.rand(3, 20, 1, generator=generator) + 0.5
    for relative in (False, True):
        gate = Gate(threshold=thresholds, relative=relative, discount=RankDiscount(4, 0.7))
        found = affinities > gate.cut(affinities, length)
        own = (thresholds * (length if relative else 1)).expand_as(affinities)
        multiples = affinities / own.clamp_min(1e-12)
        expected = torch.zeros_like(found)
        for token in [(i, j) for i in range(3) for j in range(20)]:
            for place, feature in enumerate(multiples[token].sort(descending=True).indices, 1):
                worth = affinities[token][feature] * min(1, 4 / place) ** 0.7
                expected[token][feature] = worth > own[token][feature].clamp_min(0)
        assert torch.equal(found, expected)
        assert 4 < found.sum(-1).float().mean() < (affinities > own).sum(-1).float().mean()
    plain = Gate(threshold=torch.tensor(-1.0)).cut(affinities, length)
    assert torch.equal(affinities > plain, affinities > 0)
    assert torch.equal(affinities > Gate().cut(affinities, length), affinities > 0)
    largest = affinities >= Gate(k=5).cut(affinities, length)
    assert torch.equal(largest.sum(-1), torch.full((3, 20), 5))


def test_what_is_ranked_by_more_than_affinities_has_none():
    require_plain("affinity")
    require_plain("token_norm")
    with pytest.raises(UsageError, match="importance='gain' depends on more than affinities"):
        MutualChoiceSAE(8, 16, 3, importance="gain").gate()
