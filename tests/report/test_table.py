"""The tables of a report, read back."""

from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from lightning_sae.report import write_tables
from lightning_sae.report.collect import BEFORE
from tests.report.made import FEATURES, made, texts


def written(folder: Path, **options):
    report, _ = made(**options)
    write_tables(report, folder / "f.parquet", folder / "e.parquet")
    return report, *(parquet.read_table(folder / f"{n}.parquet").to_pylist() for n in "fe")


def test_a_row_a_feature(tmp_path: Path):
    report, features, _ = written(tmp_path)
    assert [row["feature"] for row in features] == list(range(FEATURES))
    for feature, row in enumerate(features):
        assert row["state"] == report.state[feature]
        assert row["count"] == report.firings.count[feature]
        assert row["density"] == pytest.approx(row["count"] / report.firings.tokens)
        assert row["mean"] == report.firings.mean[feature]
        assert row["maximum"] == report.firings.top.value[feature, 0]
        assert row["histogram"] == report.firings.histogram[feature].tolist()
        assert row["bin_width"] == report.firings.bin_width[feature]
        assert row["nearest"] == report.nearest[0][feature].tolist()
        assert row["promoted"] == texts(report.lens.promoted[feature].tolist())
        assert row["demoted_logits"] == report.lens.demoted_logits[feature].tolist()


def test_a_model_without_logits_has_no_columns_of_them(tmp_path: Path):
    _, features, _ = written(tmp_path, with_lens=False)
    assert "promoted" not in features[0]


def test_a_row_an_example(tmp_path: Path):
    report, _, examples = written(tmp_path)
    assert len(examples) == len(report.top.feature) + len(report.sample.feature)
    assert [row["feature"] for row in examples] == sorted(row["feature"] for row in examples)
    for kind, windows in (("top", report.top), ("sample", report.sample)):
        rows = [row for row in examples if row["kind"] == kind]
        for i, row in enumerate(rows):
            inside = windows.token_ids[i] >= 0
            assert row["feature"] == windows.feature[i]
            assert row["context"] == windows.context[i]
            assert row["position"] == windows.position[i]
            assert row["value"] == windows.values[i, BEFORE] > 0
            assert row["token_ids"] == windows.token_ids[i][inside].tolist()
            assert row["tokens"] == texts(row["token_ids"])
            assert row["values"] == windows.values[i][inside].tolist()
            assert row["values"][row["firing"]] == row["value"]
            quarter = None if kind == "top" else report.sample_quarter[i]
            assert row["quarter"] == quarter
    assert torch.isfinite(torch.tensor([row["value"] for row in examples])).all()
