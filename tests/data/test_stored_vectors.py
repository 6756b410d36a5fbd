import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_sae.checks import UsageError
from lightning_sae.data.stored_vectors import StoredVectors
from lightning_sae.data.vector_files import METADATA, open_vectors
from tests.data.stored import save_npy, vectors
from tests.data.tiny import D_MODEL, LENGTH


def stored(path, run_length=5, skip_positions=0):
    files = open_vectors(str(path), None, "activations='there'")
    return StoredVectors(files, run_length, skip_positions)


def test_contexts_are_inputs(tmp_path):
    expected = torch.from_numpy(vectors(7))
    found = stored(save_npy(tmp_path / "there", vectors(7)))
    assert (len(found), found.length, found.d_model, found.vectors) == (7, LENGTH, D_MODEL, 112)
    assert found.by_context
    assert torch.equal(found.read([6, 0, 3, 3]), expected[[6, 0, 3, 3]])
    assert torch.equal(found[2], expected[2])
    assert found.kept([1, 4]).all()


@pytest.mark.parametrize("run_length", [1, 4, 5, 100])
def test_runs_hold_each_vector_once(tmp_path, run_length):
    """The last run of a file is short, unless the file's vectors make whole runs."""
    expected = torch.from_numpy(vectors(2).reshape(-1, D_MODEL))  # 32, in files of 11, 11 and 10
    found = stored(save_npy(tmp_path / "there", expected.numpy()), run_length)
    everything = range(len(found))
    assert len(found) == sum(-(-each // run_length) for each in (11, 11, 10))
    assert found.vectors == 32
    runs, kept = found.read(everything), found.kept(everything)
    assert runs.shape == (len(found), run_length, D_MODEL)
    assert torch.equal(runs[kept], expected)
    assert not runs[~kept].any()


def test_first_positions_and_those_that_a_file_names_are_not_kept(tmp_path):
    kept = torch.ones(3, LENGTH, dtype=torch.uint8)
    kept[1, 4:] = 0
    save_file({"a": torch.randn(3, LENGTH, D_MODEL), "kept": kept}, tmp_path / "a.safetensors")
    assert torch.equal(stored(tmp_path).kept([2, 1]), kept[[2, 1]].bool())
    kept[:, :2] = 0
    assert torch.equal(stored(tmp_path, skip_positions=2).kept([2, 1]), kept[[2, 1]].bool())


def test_what_one_of_several_runs_has_held_out_is_held_out(tmp_path):
    metadata = {METADATA: json.dumps({"layer": 2})}
    for name, keys, marks in (("a", [5, 6, 7], [0, 0, 1]), ("b", [6, 8], [1, 0]), ("c", [9], None)):
        tensors = {"a": torch.randn(len(keys), LENGTH, D_MODEL), "key": torch.tensor(keys)}
        if marks is not None:  # which files of earlier versions do not have
            tensors["held_out"] = torch.tensor(marks, dtype=torch.uint8)
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    found = stored(tmp_path)
    assert found.held_out().tolist() == [False, True, True, True, False, False]
    assert found.distinct().tolist() == [0, 1, 2, 4, 5]
    assert not stored(save_npy(tmp_path / "npy", vectors(3))).held_out().any()


def test_float64_is_read_as_float32(tmp_path):
    np.save(tmp_path / "a.npy", vectors(2).astype("float64"))
    assert stored(tmp_path).read([0]).dtype == torch.float32


def test_positions_can_be_skipped_of_contexts_only(tmp_path):
    np.save(tmp_path / "a.npy", vectors(2).reshape(-1, D_MODEL))
    with pytest.raises(UsageError, match=r"^skip_positions=1: the vectors are not stored by conte"):
        stored(tmp_path, skip_positions=1)
    np.save(tmp_path / "a.npy", vectors(2))
    with pytest.raises(UsageError, match=r"^skip_positions=16 leaves nothing of 16$"):
        stored(tmp_path, skip_positions=16)
