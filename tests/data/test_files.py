"""Every document of every file is read, whatever the files are called and however stored."""

import bz2
import gzip
import json
import lzma
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.data.files import by_split, format_of
from lightning_sae.data.packer import Packer
from lightning_sae.data.text import TEXT, load_documents
from tests.data.test_packer import BOTH, pack_slowly

DEFAULTS = {
    "text_config": None,
    "text_column": "text",
    "train_split": "train",
    "validation_split": None,
    "held_out_documents": 1,
    "seed": 0,
}


def load(text, *, streaming=False, **changed):
    """Training and held-out documents, as lists of strings."""
    parts = load_documents(str(text), streaming=streaming, **{**DEFAULTS, **changed})
    return [[row["text"] for row in part] for part in parts]


def all_of(text, **changed):
    train, held_out = load(text, **changed)
    return sorted(train + held_out)


def write(file, content):
    """Write text to a file, compressed as its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(file.stem, content)
    else:
        kinds = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        with kinds.get(file.suffix, open)(file, "wt", encoding="utf-8") as out:
            out.write(content)


def save(file, texts):
    """Save documents in the format that the file's name says, each with a column of its own."""
    rows = [{f"of {file.name}": {"n": [i]}, "text": text} for i, text in enumerate(texts)]
    if ".parquet" in file.name:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif ".txt" in file.name:
        write(file, "\n\n".join(texts))
    elif ".jsonl" in file.name:
        write(file, "\n".join(map(json.dumps, rows)))
    else:
        write(file, json.dumps(rows))


NAMES = st.tuples(
    st.sampled_from(["", "sub/", "[1]*/", "train station/", "a-b.c/"]),
    st.sampled_from(["a", "the test", "train", "validation report", "b.dev"]),
    st.sampled_from([".txt", ".jsonl", ".json", ".parquet"]),
    st.sampled_from(["", ".gz", ".bz2", ".xz", ".zip"]),
).map(lambda parts: "".join(parts[:3] if parts[2] == ".parquet" else parts))
DOCUMENT = st.text(st.sampled_from("kato mi\u00e9\U0001f600"), min_size=1, max_size=20)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    files=st.dictionaries(
        NAMES, st.lists(DOCUMENT, min_size=1, max_size=6), min_size=1, max_size=4
    ),
    streaming=st.booleans(),
    length=st.integers(2, 20),
    at_once=st.integers(1, 5),
)
def test_no_document_and_no_token_is_lost(files, streaming, length, at_once):
    """Against the documents that were written, packed one token at a time."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", at_once)
        save(Path(folder, "zz.jsonl"), ["ka", "to"])  # so that there is enough to hold out
        for name, texts in files.items():
            save(Path(folder, name), texts)
        parts = load_documents(folder, streaming=streaming, **DEFAULTS)
        read = [[row["text"] for row in part] for part in parts]
        written = [text for texts in [*files.values(), ["ka", "to"]] for text in texts]
        assert sorted(read[0] + read[1]) == sorted(written)
        packer = Packer(BOTH, length)
        special = BOTH.convert_tokens_to_ids(["<s>", "</s>"])
        for part, texts in zip(parts, read, strict=True):
            expected = pack_slowly(
                lambda text: BOTH.encode(text, add_special_tokens=False), texts, length, *special
            )
            lazily = [context.tolist() for context in packer.pack_lazily(part, "text")]
            assert lazily == expected
            if not streaming:
                whole = packer.pack_all(part, "text")[:]["input_ids"]
                assert np.asarray(whole).tolist() == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.txt", "b.txt"], {"train": 2}),
        (["a.txt", "train station.txt"], {"train": 2}),
        (["a.txt", "test-flight.txt", "the dev log.txt"], {"train": 3}),
        (["a.txt", "validation.txt.gz"], {"train": 1, "validation": 1}),
        (["a.txt", "b.txt", "val/c.txt", "test/d.txt"], {"train": 2, "validation": 1, "test": 1}),
        (["a.txt", "test-00000-of-00002.txt"], {"train": 1, "test": 1}),
        (["train.txt", "dev.txt", "test_1.txt"], {"train": 1, "validation": 1, "test": 1}),
        (["wiki.train.txt", "wiki.valid.txt.gz"], {"train": 1, "validation": 1}),
        (["training/test-flight.txt", "eval/train.txt"], {"train": 1, "test": 1}),
        (
            ["data/sft-00000-of-00002.txt", "data/sft-00001-of-00002.txt"],
            {"sft": 2},
        ),
    ],
)
def test_splits_by_names(tmp_path, names, expected):
    files = [tmp_path / name for name in names]
    splits = by_split(files, tmp_path, "text='a'")
    assert {split: len(of_split) for split, of_split in splits.items()} == expected
    assert sorted(file for of_split in splits.values() for file in of_split) == sorted(files)


def test_splits_that_not_all_names_say_are_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        by_split([tmp_path / "a.txt", tmp_path / "dev.txt"], tmp_path, "text='a'")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["text='a' has files of several splits: 1 of 'train', 1 of 'validation'"]


def test_files_that_are_not_read_are_told(tmp_path, caplog):
    save(tmp_path / "a.txt", ["ka", "to"])
    for name in ("b.pdf", "c.csv", "README.md", ".hidden.txt"):
        (tmp_path / name).write_text("mi")
    with caplog.at_level("INFO"):
        assert all_of(tmp_path) == ["ka", "to"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"text='{tmp_path}' has 2 files that are not read, among them b.pdf"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", "text"),
        ("a.TXT", "text"),
        ("a.b.jsonl.gz", "json"),
        ("a.txt.zst", "text"),
        ("a.gz", None),
        ("a.txt.bak", None),
        ("txt", None),
    ],
)
def test_formats_by_names(name, expected):
    assert format_of(Path(name), TEXT.builders) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_column_matters(tmp_path, streaming):
    rows = [
        {"text": "ka", "score": 1},
        {"text": "to", "score": "high", "tags": [{"a": 1}]},
        {"score": None, "text": "mi\ud83d"},  # half of an emoji
        {"tags": {"b": None}, "text": "ru"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    assert all_of(file, streaming=streaming) == ["ka", "mi\ufffd", "ru", "to"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_encoding(tmp_path, name, streaming):
    (tmp_path / name).write_bytes('{"text": "d\u00e9j\u00e0"}\n'.encode("latin-1") * 9)
    with pytest.raises(ValueError, match=r"'utf-8' codec can't decode byte 0xe9") as caught:
        list(Packer(BOTH, 4).pack_lazily(*of_text(tmp_path / name, streaming)))
    assert str(caught.value).startswith("text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz", "b.jsonl", "b.json"])
def test_the_file_in_another_encoding_is_named(tmp_path, name):
    for other in ("a.txt", "c.txt"):
        (tmp_path / other).write_text("ka\n\nto \u00e9\n", encoding="utf-8")
    content = '[{"text": "d\u00e9j\u00e0"}]' if name == "b.json" else '{"text": "d\u00e9j\u00e0"}\n'
    encoded = content.encode("latin-1")
    file = tmp_path / name
    file.write_bytes(gzip.compress(encoded) if name.endswith("gz") else encoded)
    message = rf"^text='{tmp_path}' cannot be read: {file}: 'utf-8' codec can't decode byte 0xe9"
    with pytest.raises(ValueError, match=message):
        of_text(tmp_path, streaming=False)


def test_it_is_named_too_where_a_folder_says_what_its_files_are(tmp_path):
    card = '---\nconfigs:\n- {config_name: a, data_files: "*.txt"}\n---'
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.txt").write_text("ka", encoding="utf-8")
    (tmp_path / "b.txt").write_text("d\u00e9j\u00e0", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"cannot be read: {tmp_path / 'b.txt'}: 'utf-8' codec"):
        of_text(tmp_path, streaming=False)


def of_text(file, streaming):
    return load_documents(str(file), streaming=streaming, **DEFAULTS)[0], "text"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffka\n\nto")
    assert all_of(tmp_path / "a.txt") == ["ka", "to"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_column_that_is_not_there(tmp_path, name):
    save(tmp_path / name, ["ka", "to"])
    with pytest.raises(ValueError, match=r"^text_column='body': .* has the columns .*text$"):
        load(tmp_path / name, text_column="body")


def test_a_column_may_be_missing_from_the_first_lines(tmp_path):
    lines = ['{"id": 0}', "", *(f'{{"id": {n}, "text": "t{n}"}}' for n in range(1, 200))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train, column = of_text(tmp_path / "a.jsonl", streaming=False)
    assert "t199" in train[column] or "t198" in train[column]  # one may be held out
