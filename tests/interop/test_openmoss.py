"""SAEs in the format of OpenMOSS' llamascopium, which was not run."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_sae import FeatureChoiceSAE, UsageError
from lightning_sae.interop import load_foreign
from tests.helpers.foreign import KINDS, assert_same, refusal, there_and_back, trained


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("jumprelu", "gated")])
@pytest.mark.parametrize("normalize_inputs", ["average", "token"])
def test_every_architecture_can_leave_and_come_back(kind, normalize_inputs, tmp_path: Path):
    sae = trained(kind, normalize_inputs=normalize_inputs)
    assert_same(sae, there_and_back(sae, "openmoss", tmp_path))
    names = {"W_E", "b_E", "W_D", "b_D"}
    if kind in ("mutual_choice", "feature_choice_zipf"):
        names.add("activation_function.log_jumprelu_threshold")
    assert load_file(tmp_path / "sae_weights.safetensors").keys() == names


def test_thresholds_that_were_trained_come_back_as_those_of_feature_choice(tmp_path: Path):
    """It does not say what was trained."""
    again = there_and_back(trained("jumprelu"), "openmoss", tmp_path)
    assert type(again) is FeatureChoiceSAE


def test_what_it_cannot_say_is_refused(tmp_path: Path):
    sae = trained("mutual_choice", importance="token_norm")
    assert "no thresholds relative to a token's length" in refusal(sae, "openmoss", tmp_path)
    sae = trained("mutual_choice", rank_discount=1.0)
    assert "it knows no rank_discount=1.0: export with" in refusal(sae, "openmoss", tmp_path)
    sae = trained("feature_choice_zipf")
    sae.threshold[3] = 0
    assert "the logarithm of thresholds, and one here is 0" in refusal(sae, "openmoss", tmp_path)


def test_what_is_not_read_is_told(tmp_path: Path):
    there_and_back(trained("topk"), "openmoss", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"topk"', '"batchtopk"'))
    with pytest.raises(UsageError, match=r"act_fn='batchtopk' of config\.json is not read"):
        load_foreign(f"openmoss:{tmp_path}")
