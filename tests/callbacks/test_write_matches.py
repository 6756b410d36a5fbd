import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_sae.allocation import Matches
from lightning_sae.callbacks import WriteMatches
from tests.callbacks.fakes import N_FEATURES, TOKENS, FakeData, FakeSAE, tensors, trainer


def predict(folder, module, **data):
    run = trainer(folder, WriteMatches(folder / "matches"))
    run.predict(module, return_predictions=False, **data)
    return sorted((folder / "matches").iterdir())


def shape(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["shape"])


def test_every_batch_is_written_with_its_tokens(tmp_path):
    module, data = FakeSAE(), FakeData()
    files = predict(tmp_path, module, datamodule=data)
    assert [file.name for file in files] == [f"rank0-batch0000{i}.safetensors" for i in range(3)]
    for file, batch in zip(files, data.batches, strict=True):
        read = load_file(file)
        assert set(read) == {"token", "feature", "value", "input_ids", "kept"}
        matches = Matches(read["token"], read["feature"], read["value"], shape(file))
        codes = module.encoder(batch["activations"])
        assert torch.equal(matches.to_dense(), codes.where(codes > 0.3, 0))
        assert torch.equal(read["input_ids"], batch["input_ids"])
        assert read["kept"].dtype == torch.uint8
        assert torch.equal(read["kept"].bool(), batch["kept"])
        assert shape(file) == [int(batch["kept"].sum()), N_FEATURES]


def test_plain_batches_have_no_tokens_to_write(tmp_path):
    files = predict(tmp_path, FakeSAE(), dataloaders=tensors(2))
    assert set(load_file(files[1])) == {"token", "feature", "value"}
    assert shape(files[1]) == [TOKENS, N_FEATURES]


def test_matches_that_share_memory_are_written(tmp_path):
    class Columns(FakeSAE):
        def predict_step(self, batch):
            token, feature = torch.tensor([[0, 1], [2, 3]]).unbind(1)
            return Matches(token, feature, torch.ones(2), (3, 4))

    (file,) = predict(tmp_path, Columns(), dataloaders=tensors(1))
    assert load_file(file)["feature"].tolist() == [1, 3]


def test_a_batch_without_matches_is_written(tmp_path):
    module = FakeSAE()
    torch.nn.init.zeros_(module.encoder.weight)
    torch.nn.init.zeros_(module.encoder.bias)
    (file,) = predict(tmp_path, module, dataloaders=tensors(1))
    assert load_file(file)["value"].shape == (0,)


def test_two_runs_are_not_mixed(tmp_path):
    files = predict(tmp_path, FakeSAE(), dataloaders=tensors(1))
    before = files[0].read_bytes()
    with pytest.raises(ValueError, match=r"output_dir=.*matches holds matches already"):
        predict(tmp_path, FakeSAE(), dataloaders=tensors(2))
    assert [file.read_bytes() for file in (tmp_path / "matches").iterdir()] == [before]


def test_each_run_has_a_folder_of_its_own(tmp_path):
    for version in ("version_0", "version_1"):
        run = trainer(tmp_path, WriteMatches(), logger=CSVLogger(tmp_path, "runs"))
        run.predict(FakeSAE(), tensors(1), return_predictions=False)
        (file,) = (tmp_path / "runs" / version).rglob("*.safetensors")
        assert file.parent.name == "matches"


def test_without_a_logger_they_are_where_the_trainer_writes(tmp_path):
    run = trainer(tmp_path, WriteMatches())
    run.predict(FakeSAE(), tensors(1), return_predictions=False)
    assert (tmp_path / "matches/rank0-batch00000.safetensors").is_file()


def test_a_failure_leaves_no_file_under_a_final_name(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("lightning_sae.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        predict(tmp_path, FakeSAE(), dataloaders=tensors(1))
    assert not list((tmp_path / "matches").iterdir())
