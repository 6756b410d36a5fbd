"""From an SAE and its data to files."""

from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from lightning_sae.checks import UsageError
from lightning_sae.report import nearest_features, report_of, write_report
from tests.data.tiny import LENGTH
from tests.report.test_page import data_in
from tests.report.tiny_sae import trained_in


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    return trained_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_a_report_is_of_the_first_contexts(split: str, trained):
    sae, data = trained
    report = report_of(sae, data, tokens=7 * LENGTH + 3, split=split)
    inputs = data.train_inputs() if split == "train" else data.held_out_inputs()
    contexts = torch.stack([ids for ids, _ in zip(inputs, range(7), strict=False)])
    assert torch.equal(report.contexts, contexts)
    kept = data.kept(contexts)
    codes = sae.encode(data.read(contexts)[kept].float())
    assert report.firings.tokens == kept.sum()
    assert torch.equal(report.firings.count, (codes > 0).sum(0))
    assert torch.equal(report.nearest[0], nearest_features(sae.W_dec)[0])
    assert report.lens.promoted.shape == (24, 10)
    about = {name: values for group in report.about.values() for name, values in group.items()}
    assert about["split"] == split
    assert "0.5" in str(report.about)  # the FVU


def test_three_files_say_the_same(trained, tmp_path: Path):
    sae, data = trained
    report = report_of(sae, data, tokens=5 * LENGTH)
    page, features, examples = write_report(report, tmp_path / "of a run.html")
    names = ("of a run.html", "of a run.features.parquet", "of a run.examples.parquet")
    assert {each.name for each in tmp_path.glob("of a run*")} == {*names}
    shown = data_in(page.read_text())
    assert shown["count"] == parquet.read_table(features)["count"].to_pylist()
    top = [row for row in parquet.read_table(examples).to_pylist() if row["kind"] == "top"]
    assert len(top) == sum(map(len, shown["top"]))
    tokenizer = data.model.tokenizer(LENGTH)
    assert all("".join(row["tokens"]) == tokenizer.decode(row["token_ids"]) for row in top)


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_a_cache_notes_what_it_keeps_of_a_report(split: str, trained, tmp_path: Path):
    sae, data = trained
    data.cache_dir = str(tmp_path / "kept")
    report_of(sae, data, tokens=5 * LENGTH, split=split)
    data.teardown("test")
    (file,) = (tmp_path / "kept").glob("*/*.safetensors")
    found = load_file(file)
    assert torch.equal(found["kept"].bool(), data.kept(found["input_ids"]))
    assert found["held_out"].tolist() == [split == "held_out"] * 5


def test_all_text_is_read_where_there_is_less(trained):
    sae, data = trained
    report = report_of(sae, data, tokens=10**6)
    assert len(report.contexts) == len(list(data.held_out_inputs()))


def test_a_model_whose_blocks_cannot_be_told_has_no_lens(trained, monkeypatch, tmp_path: Path):
    def untold(stream, directions):
        raise UsageError("it should have one ModuleList")

    monkeypatch.setattr("lightning_sae.report.write.logit_lens", untold)
    sae, data = trained
    report = report_of(sae, data, tokens=5 * LENGTH)
    assert report.lens is None
    assert len(write_report(report, tmp_path / "report.html")) == 3


def test_less_than_a_context_is_refused(trained):
    sae, data = trained
    with pytest.raises(UsageError, match=f"tokens=3 must be at least {LENGTH}"):
        report_of(sae, data, tokens=3)
