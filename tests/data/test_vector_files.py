import json

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_sae.checks import UsageError
from lightning_sae.data.vector_files import METADATA, open_vectors, require_alike
from tests.data.stored import LAYOUTS, save_npy, save_parquet, save_safetensors, vectors
from tests.data.tiny import D_MODEL, LENGTH


def opened(path, column=None):
    return open_vectors(str(path), column, f"activations='{path}'")


def everything(files):
    return torch.cat([file.rows(0, file.shape[0]) for file in files])


@pytest.mark.parametrize(
    ("layout", "flat"), [*((layout, False) for layout in LAYOUTS), ("npy", True), ("parquet", True)]
)
def test_all_layouts_hold_the_same(tmp_path, layout, flat):
    stored = vectors().reshape(-1, D_MODEL) if flat else vectors()
    files = opened(LAYOUTS[layout](tmp_path / "there", stored))
    require_alike(files)
    assert sum(file.shape[0] for file in files) == len(stored)
    assert all(file.shape[1:] == stored.shape[1:] for file in files)
    assert torch.equal(everything(files).float(), torch.from_numpy(stored).float())
    assert torch.equal(files[0].rows(3, 5).float(), torch.from_numpy(stored[3:5]).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_floats_are_read_as_they_are(tmp_path, dtype):
    saved = torch.from_numpy(vectors()).to(dtype)
    save_file({"activations": saved, "other": saved.clone()}, tmp_path / "a.safetensors")
    (file,) = opened(tmp_path / "a.safetensors")
    assert file.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(file.rows(0, len(saved)), saved)
    assert file.kept is None
    assert file.made_of == {}


def test_a_file_may_say_what_counts_and_what_it_is_of(tmp_path):
    kept = torch.rand(4, LENGTH) < 0.5
    tensors = {"activations": torch.randn(4, LENGTH, D_MODEL), "kept": kept.to(torch.uint8)}
    made_of = {"model_name": "small", "layer": 2}
    save_file(tensors, tmp_path / "a.safetensors", {METADATA: json.dumps(made_of)})
    (file,) = opened(tmp_path)
    assert torch.equal(file.kept(1, 3), kept[1:3])
    assert file.made_of == made_of


def test_files_are_named_by_folder_file_and_pattern(tmp_path):
    folder = save_npy(tmp_path / "layer[1]", vectors())  # a name that is no pattern
    assert len(opened(folder)) == 3
    assert len(opened(folder / "1.npy")) == 1
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "9.npy", vectors(2))
    (tmp_path / "more" / "notes.txt").write_text("of no matter in a folder")
    assert len(opened(tmp_path / "more")) == 1
    found = opened(f"{tmp_path}/*/[019].npy")
    assert [file.shape[0] for file in found] == [20, 20, 2]


def test_a_column_is_named_where_there_are_several(tmp_path):
    a, b = torch.zeros(3, D_MODEL), torch.ones(3, D_MODEL)
    save_file({"a": a, "b": b}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="has a, b, of which 2 can be vectors: name it by"):
        opened(tmp_path)
    assert torch.equal(everything(opened(tmp_path, "b")), b)


def ragged(folder):
    folder.mkdir()
    rows = {"vector": [[1.0, 2.0], [1.0, 2.0], [1.0]]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "a.parquet")
    return folder


def saved(name, array):
    def save(folder):
        folder.mkdir()
        np.save(folder / name, array)
        return folder

    return save


def both(first, second):
    def save(folder):
        first(folder)
        second(folder / "more")
        for file in (folder / "more").iterdir():
            file.rename(folder / f"z{file.name}")
        (folder / "more").rmdir()
        return folder

    return save


def cut(save, by=10):
    def save_less(folder):
        save(folder, vectors())
        file = min(file for file in folder.iterdir() if file.suffix != ".json")
        file.write_bytes(file.read_bytes()[:-by])
        return folder

    return save_less


ROWS = np.zeros((4, D_MODEL), "float32")
BAD = {
    "nothing there": (lambda folder: folder, "does not exist$"),
    "empty folder": (lambda folder: folder.mkdir() or folder, "and is nothing$"),
    "no vectors": (saved("a.npy", ROWS[:0]), "holds no vectors$"),
    "integers": (saved("a.npy", ROWS.astype("int32")), "holds int32: vectors must be one of float"),
    "one axis": (saved("a.npy", ROWS[0]), r"has the shape \(8,\): vectors must be \(vectors, d_"),
    "four axes": (saved("a.npy", ROWS[None, None]), r"has the shape \(1, 1, 4, 8\): vectors must"),
    "no width": (saved("a.npy", ROWS[:, :0]), r"has the shape \(4, 0\): vectors must be"),
    "objects": (saved("a.npy", np.array([None, "a"])), r"a.npy' cannot be read: "),
    "other widths": (
        both(saved("a.npy", ROWS), saved("b.npy", ROWS[:, :4])),
        r"zb.npy' has vectors of \(4,\), and '.*a.npy' \(8,\)$",
    ),
    "other dtypes": (
        both(saved("a.npy", ROWS), saved("b.npy", ROWS.astype("float16"))),
        "zb.npy' has vectors in float16, and '.*a.npy' float32$",
    ),
    "two formats": (
        both(saved("a.npy", ROWS), lambda folder: save_safetensors(folder, vectors())),
        r"holds files in \.npy and \.safetensors: name those of one kind$",
    ),
    "short npy": (cut(save_npy), "0.npy' cannot be read: "),
    "short safetensors": (cut(save_safetensors), "chunk-00000000.* cannot be read: "),
    "short parquet": (cut(save_parquet), "cannot be read: "),
    "ragged": (lambda folder: ragged(folder), "rows 0 to 3 of the column 'vector' differ in le"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, kind):
    save, message = BAD[kind]
    folder = save(tmp_path / "there")
    with pytest.raises(UsageError, match=message) as caught:
        everything(opened(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("nope", r"^column='nope' is not there: .* has activation, tokens$"),
        ("tokens", r"^column='tokens' is no vectors of floats: "),
    ],
)
def test_a_column_that_will_not_do(tmp_path, column, message):
    with pytest.raises(UsageError, match=message):
        opened(save_safetensors(tmp_path / "there", vectors()), column)


def test_an_array_of_another_machine_is_read(tmp_path):
    rows = np.arange(12, dtype=">f4").reshape(4, 3)
    np.save(tmp_path / "there.npy", rows)
    (file,) = opened(tmp_path)
    assert file.rows(1, 3).tolist() == rows[1:3].tolist()


@pytest.mark.parametrize("metadata", ["[1]", "null", '"x"', "{"])
def test_metadata_that_are_no_object_are_told(metadata, tmp_path):
    path = tmp_path / "there.safetensors"
    save_file({"activations": torch.zeros(2, 3)}, path, {METADATA: metadata})
    with pytest.raises(UsageError, match=r"there\.safetensors"):
        opened(tmp_path)


def test_an_array_has_no_columns(tmp_path):
    with pytest.raises(UsageError, match=r"^column='a': .*npy' holds one array, which has no name"):
        opened(save_npy(tmp_path / "there", vectors()), "a")


def test_files_of_another_layer_are_not_mixed(tmp_path):
    for name, layer in (("a", 1), ("b", 2)):
        metadata = {METADATA: json.dumps({"layer": layer})}
        save_file({"activations": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors", metadata)
    with pytest.raises(UsageError, match=r"b.safetensors' has activations of {.*'layer': 2"):
        opened(tmp_path)
