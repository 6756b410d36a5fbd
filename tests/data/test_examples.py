"""What text and images have in common, seen on songs."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_sae.data.examples import Modality, load_examples
from tests.data.tiny import documents

SONGS = Modality("songs", "tunes", {".jsonl": "json", ".parquet": "parquet"})
DEFAULTS = {
    "config": None,
    "column": "tune",
    "train_split": "train",
    "validation_split": None,
    "held_out": 5,
    "streaming": False,
    "seed": 0,
}
TUNES = documents(30)


def load(songs, **changed):
    """Training and held-out tunes, as lists of strings."""
    parts = load_examples(SONGS, str(songs), path=str(songs), **{**DEFAULTS, **changed})
    column = changed.get("column", "tune")
    assert all(list(row) == [column] for part in parts for row in part)
    return [[row[column] for row in part] for part in parts]


def save(folder, name, tunes=TUNES, column="tune"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, column: tune} for i, tune in enumerate(tunes)]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_files(tmp_path, name, streaming):
    train, held_out = load(save(tmp_path, name), streaming=streaming)
    assert len(held_out) == 5
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(TUNES)
    if streaming:
        assert held_out + train == TUNES
    else:
        assert held_out != TUNES[:5]


def test_the_seed_chooses_what_is_held_out(tmp_path):
    file = save(tmp_path, "a.jsonl")
    assert load(file) == load(file)
    assert load(file)[1] != load(file, seed=1)[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_with_splits(tmp_path, suffix, streaming):
    for begin, split in enumerate(("train", "validation", "test")):
        save(tmp_path, f"{split}.{suffix}", TUNES[begin * 10 :][:10])
    train, held_out = load(tmp_path, streaming=streaming)
    assert train == TUNES[:10]
    # All of the split, in an order of its own unless it is read as it comes.
    assert (held_out == TUNES[10:20]) == streaming
    assert sorted(held_out) == sorted(TUNES[10:20])
    train, chosen = load(tmp_path, streaming=streaming, validation_split="test")
    assert train == TUNES[:10]
    assert sorted(chosen) == sorted(TUNES[20:])
    train, held_out = load(tmp_path, streaming=streaming, train_split="validation")
    assert sorted(train + held_out) == sorted(TUNES[10:20])


def test_a_column_of_another_name(tmp_path):
    train, held_out = load(save(tmp_path, "a.jsonl", column="content"), column="content")
    assert sorted(train + held_out) == sorted(TUNES)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"column": "body"}, "songs_column='body': songs='FILE' has the columns id, tune"),
        ({"train_split": "trian"}, "train_split='trian': songs='FILE' has the splits train"),
        ({"validation_split": "dev"}, "validation_split='dev': songs='FILE' has the splits train"),
        (
            {"validation_split": "train"},
            "validation_split='train' is the split to train on; "
            "leave it out to hold out some of its tunes",
        ),
    ],
)
def test_wrong_choices(tmp_path, streaming, changed, message):
    file = save(tmp_path, "a.jsonl")
    message = message.replace("FILE", str(file))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(file, streaming=streaming, **changed)


def test_nothing_left_to_train_on(tmp_path):
    file = save(tmp_path, "a.jsonl", TUNES[:5])
    with pytest.raises(ValueError, match=r"^held_out_tunes=5 leaves .* has 5 tunes$"):
        load(file)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_examples(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^songs='.*a.jsonl' has no tunes$"):
        load(tmp_path / "a.jsonl", streaming=streaming)


@pytest.mark.parametrize(
    ("songs", "message"),
    [
        ("no.jsonl", r"^songs='no.jsonl' does not exist$"),
        ("./no", r"^songs='./no' does not exist$"),
        ("no/such", r"^songs='no/such' cannot be read: Couldn't reach 'no/such' on the Hub"),
    ],
)
def test_songs_that_are_not_there(songs, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(songs)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tune": ')
    with pytest.raises(ValueError, match=r"^songs='.*a.jsonl' cannot be read: .") as caught:
        load(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match=r"should end in one of .jsonl, .parquet$"):
        load(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"cannot be read: BuilderConfig 'en' not found."):
        load(save(tmp_path / "folder", "a.jsonl").parent, config="en")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read: .* contain any data files$"):
        load(tmp_path / "empty")
