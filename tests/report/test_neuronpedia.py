"""A report in Neuronpedia's files: read back, and by SAEDashboard where it is installed."""

import json
from pathlib import Path

import pytest

from lightning_sae.report import FeatureReport, neuronpedia, write_neuronpedia
from tests.report.made import FEATURES, made, texts

NAMES = {"model_id": "gpt2-small", "layer": 3, "source_set": "mine-res"}


@pytest.fixture
def report() -> FeatureReport:
    found, _ = made()
    found.about["Read for this report"] = {"text": "some/text"}
    return found


def written(report: FeatureReport, folder: Path) -> list[dict]:
    paths = write_neuronpedia(report, folder, **NAMES)
    return [json.loads(path.read_text()) for path in paths]


def test_what_is_known_of_a_feature_is_there(report, tmp_path: Path):
    (batch,) = written(report, tmp_path)
    assert batch.items() >= {"model_id": "gpt2-small", "layer": 3, "sae_set": "mine-res"}.items()
    firings = report.firings
    for i, feature in enumerate(batch["features"]):
        assert feature["feature_index"] == i
        assert feature["frac_nonzero"] == firings.density[i]
        assert feature["pos_str"] == texts(report.lens.promoted[i].tolist())
        assert sum(feature["freq_hist_data_bar_heights"]) == firings.count[i]
        middles = feature["freq_hist_data_bar_values"]
        heights, count = feature["freq_hist_data_bar_heights"], int(firings.count[i])
        mean = sum(n * x for n, x in zip(heights, middles, strict=True)) / max(1, count)
        assert abs(mean - firings.mean[i]) <= firings.bin_width[i] / 2
    assert batch["features"][-1]["activations"] == []  # which is dead


def test_top_contexts_come_first_then_the_sample_in_quarters(report, tmp_path: Path):
    (batch,) = written(report, tmp_path)
    for i, feature in enumerate(batch["features"][:-1]):
        found = feature["activations"]
        tops = (report.firings.top.place[i] >= 0).sum()
        assert [each["bin_contains"] for each in found].count(-1) == tops
        for each in found:
            value = each["values"][each["qualifying_token_index"]]
            assert value > 0
            assert len(each["tokens"]) == len(each["values"])
            assert each["bin_min"] * 0.999 <= value <= each["bin_max"] * 1.001
        assert found[0]["bin_max"] == report.firings.top.value[i, 0]
        assert {each["bin_contains"] for each in found[tops:]} == {0.25}
        limits = [each["bin_max"] for each in found[tops:]]
        assert limits == sorted(limits, reverse=True)


def test_many_features_are_several_files(report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (whole,) = written(report, tmp_path / "one")
    monkeypatch.setattr(neuronpedia, "FEATURES", 4)
    first, second = written(report, tmp_path / "two")
    assert len(first["features"]) == 4
    assert first["features"] + second["features"] == whole["features"]
    assert len(whole["features"]) == FEATURES
    with pytest.raises(FileExistsError):
        written(report, tmp_path / "two")


def test_saedashboard_reads_it(report, tmp_path: Path):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    (batch,) = written(report, tmp_path)
    again = dashboard.NeuronpediaDashboardBatch(**batch).to_dict()
    assert again == json.loads((tmp_path / "batch-0.json").read_text())
