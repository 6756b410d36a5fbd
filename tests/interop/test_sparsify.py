"""TopK SAEs in sparsify's format, and, where it is installed, in sparsify."""

import json
from pathlib import Path

import pytest

from lightning_sae import UsageError
from lightning_sae.interop import export, load_foreign
from tests.helpers.foreign import (
    RECORD,
    as_its_card_says,
    assert_same,
    refusal,
    there_and_back,
    tokens,
    trained,
)


@pytest.mark.parametrize("importance", ["affinity", "token_norm"])
def test_topk_can_leave_and_come_back(importance: str, tmp_path: Path):
    sae = trained("topk", importance=importance)
    again = there_and_back(sae, "sparsify", tmp_path)
    assert_same(sae, again)
    assert again.record == RECORD


def test_what_it_cannot_say_is_refused(tmp_path: Path):
    for kind in ("standard", "mutual_choice", "feature_choice_zipf"):
        assert "it has no thresholds" in refusal(trained(kind), "sparsify", tmp_path)
    told = refusal(trained("topk", normalize_inputs="token"), "sparsify", tmp_path)
    assert "it cannot normalise tokens (normalize_inputs='token'): train with " in told


@pytest.mark.parametrize(
    "settings", [{"skip_connection": True}, {"transcode": True}, {"activation": "groupmax"}]
)
def test_what_is_not_read_is_told(settings: dict, tmp_path: Path):
    there_and_back(trained("topk"), "sparsify", tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UsageError, match=rf"{next(iter(settings))}=.* of cfg\.json is not read"):
        load_foreign(f"sparsify:{tmp_path}")


def test_sparsify_loads_it(tmp_path: Path):
    pytest.importorskip("sparsify")
    found = export(trained("topk"), "sparsify", tmp_path)
    assert {comparison.by for comparison in found} == {"sparsify"}
    codes = as_its_card_says(tmp_path, tokens())["codes"]
    assert codes.top_acts.shape == codes.top_indices.shape == (len(tokens()), 4)
