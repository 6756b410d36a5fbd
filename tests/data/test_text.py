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
    column = changed.get("text_column", "text")
    assert all(list(row) == [column] for part in parts for row in part)
    return [[row[column] for row in part] for part in parts]


def save(folder, name, texts=TEXTS, column="text"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
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
    if streaming:
        assert held_out + train == TEXTS
    else:
        assert held_out != TEXTS[:5]


def test_the_seed_chooses_what_is_held_out(tmp_path):
    file = save(tmp_path, "a.jsonl")
    assert load(file) == load(file)
    assert load(file)[1] != load(file, seed=1)[1]


def test_paragraphs_are_the_documents_of_txt_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\n\n\nfour")
    train, held_out = load(tmp_path / "a.txt", held_out_documents=1)
    assert sorted(train + held_out) == ["four", "one\ntwo", "three"]
    (tmp_path / "b.txt").write_text("five\n\nsix")
    (tmp_path / "README.md").write_text("# Not text")
    train, held_out = load(tmp_path, held_out_documents=1)
    assert sorted(train + held_out) == ["five", "four", "one\ntwo", "six", "three"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_folder_with_splits(tmp_path, suffix, streaming):
    for begin, split in enumerate(("train", "validation", "test")):
        save(tmp_path, f"{split}.{suffix}", TEXTS[begin * 10 :][:10])
    train, held_out = load(tmp_path, streaming=streaming)
    assert train == TEXTS[:10]
    # All of the split, in an order of its own unless it is read as it comes.
    assert (held_out == TEXTS[10:20]) == streaming
    assert sorted(held_out) == sorted(TEXTS[10:20])
    train, chosen = load(tmp_path, streaming=streaming, validation_split="test")
    assert train == TEXTS[:10]
    assert sorted(chosen) == sorted(TEXTS[20:])
    train, held_out = load(tmp_path, streaming=streaming, train_split="validation")
    assert sorted(train + held_out) == sorted(TEXTS[10:20])


def test_a_column_of_another_name(tmp_path):
    train, held_out = load(save(tmp_path, "a.jsonl", column="content"), text_column="content")
    assert sorted(train + held_out) == sorted(TEXTS)


def test_the_packaged_text():
    train, held_out = load_documents("quickstart", **DEFAULTS)
    assert len(train) > len(held_out) > 50
    assert not set(train["text"]) & set(held_out["text"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_column": "body"}, "text_column='body': text='FILE' has the columns id, text"),
        ({"train_split": "trian"}, "train_split='trian': text='FILE' has the splits train"),
        ({"validation_split": "dev"}, "validation_split='dev': text='FILE' has the splits train"),
        (
            {"validation_split": "train"},
            "validation_split='train' is the split to train on; "
            "leave it out to hold out some of its documents",
        ),
    ],
)
def test_wrong_choices(tmp_path, streaming, changed, message):
    file = save(tmp_path, "a.jsonl")
    message = message.replace("FILE", str(file))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(file, streaming=streaming, **changed)


def test_nothing_left_to_train_on(tmp_path):
    file = save(tmp_path, "a.jsonl", TEXTS[:5])
    with pytest.raises(ValueError, match=r"^held_out_documents=5 leaves .* has 5 documents$"):
        load(file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_documents(tmp_path, name, streaming):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"^text='.*{name}' has no documents$"):
        load(tmp_path / name, streaming=streaming)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.txt", r"^text='no.txt' does not exist$"),
        ("./no", r"^text='./no' does not exist$"),
        ("no/such", r"^text='no/such' cannot be read: Couldn't reach 'no/such' on the Hub"),
    ],
)
def test_text_that_is_not_there(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"^text='.*a.json' cannot be read: .") as caught:
        load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match=r"should end in one of .txt, .json, .jsonl, .parquet$"):
        load(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"cannot be read: BuilderConfig 'en' not found."):
        load(save(tmp_path / "folder", "a.jsonl").parent, text_config="en")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read: .* contain any data files$"):
        load(tmp_path / "empty")
