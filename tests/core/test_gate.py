"""What an SAE is to others: which affinities of a token are its code."""

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, StandardSAE, TopKSAE, UsageError
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


def test_what_is_ranked_by_more_than_affinities_has_none():
    require_plain("affinity")
    require_plain("token_norm")
    with pytest.raises(UsageError, match="importance='gain' depends on more than affinities"):
        MutualChoiceSAE(8, 16, 3, importance="gain").gate()
