import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_sae.data.text import load_documents
from tests.data.tiny import documents

DEFAULTS = {
    "text_config": None,
    "text_column": "text",
    "train_split": "train",
    "validation_split": None,
    "held_out_documents": 5,
    "streaming": False,
    "seed": 0,
}
TEXTS = documents(30)


def load(text, **changed):
    """Training and held-out documents, as lists of strings."""
    parts = load_documents(str(text), **{**DEFAULTS, **changed})
    assert all(list(row) == ["text"] for part in parts for row in part)
    return [[row["text"] for row in part] for part in parts]


def save(folder, name, texts=TEXTS):
    file = folder / name
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file.write_text("\n\n".join(texts))
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.parquet"])
def test_files(tmp_path, name, streaming):
    train, held_out = load(save(tmp_path, name), streaming=streaming)
    assert len(held_out) == 5
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_txt_files_with_splits(tmp_path, streaming):
    for begin, split in enumerate(("train", "validation", "test")):
        save(tmp_path, f"{split}.txt", TEXTS[begin * 10 :][:10])
    train, held_out = load(tmp_path, streaming=streaming)
    assert train == TEXTS[:10]
    assert sorted(held_out) == sorted(TEXTS[10:20])
    assert sorted(load(tmp_path, validation_split="test")[1]) == sorted(TEXTS[20:])


def test_paragraphs_are_the_documents_of_txt_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\n\n\nfour")
    train, held_out = load(tmp_path / "a.txt", held_out_documents=1)
    assert sorted(train + held_out) == ["four", "one\ntwo", "three"]
    (tmp_path / "b.txt").write_text("five\n\nsix")
    (tmp_path / "README.md").write_text("# Not text")
    train, held_out = load(tmp_path, held_out_documents=1)
    assert sorted(train + held_out) == ["five", "four", "one\ntwo", "six", "three"]


def test_the_packaged_text():
    train, held_out = load_documents("quickstart", **DEFAULTS)
    assert len(train) > len(held_out) > 50
    assert not set(train["text"]) & set(held_out["text"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_column": "body"}, "text_column='body': text='FILE' has the columns id, text"),
        (
            {"held_out_documents": 30},
            "held_out_documents=30 leaves nothing to train on: text='FILE' has 30 documents",
        ),
    ],
)
def test_messages_use_the_arguments_of_text(tmp_path, changed, message):
    file = save(tmp_path, "a.jsonl")
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FILE', str(file)))}$"):
        load(file, **changed)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_documents(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"^text='.*a.txt' has no documents$"):
        load(tmp_path / "a.txt", streaming=streaming)
    with pytest.raises(ValueError, match=r"^text='' is no data set$"):
        load("", streaming=streaming)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match=r"should end in one of .txt, .json, .jsonl, .parquet$"):
        load(tmp_path / "a.pdf")
