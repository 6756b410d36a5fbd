import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_sae.data import Packer
from tests.data.tiny import END, documents, tokenizer
from tests.helpers.ddp import run_on_two

ONE = tokenizer(END, END)
BOTH = tokenizer("<s>", "</s>", "<pad>")
ONLY_BOS = tokenizer("<s>")
ONLY_EOS = tokenizer(None, "</s>")
NEITHER = tokenizer(pad="<pad>")
MANY = tokenizer(None, "</s>", extra=["<a>", "<b>"])
START_AND_SEPARATOR = {
    "one": (ONE, END, END),
    "both": (BOTH, "<s>", "</s>"),
    "only bos": (ONLY_BOS, "<s>", "<s>"),
    "only eos": (ONLY_EOS, "</s>", "</s>"),
    "neither": (NEITHER, None, None),
}


def pack_slowly(tokens_of, texts, length, start, separator):
    """One token at a time."""
    contexts, current = [], []
    for text in texts:
        for token in tokens_of(text) + ([] if separator is None else [separator]):
            if not current and start is not None:
                current = [start]
            current.append(token)
            if len(current) == length:
                contexts.append(current)
                current = []
    return contexts


@pytest.mark.parametrize("kind", START_AND_SEPARATOR)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    length=st.integers(2, 40),
    texts=st.lists(st.text(st.sampled_from("kato mi\n0é"), max_size=30), min_size=1, max_size=8),
)
def test_packs_as_one_token_at_a_time(kind, length, texts):
    tokenizer, *special = START_AND_SEPARATOR[kind]
    start, separator = (
        None if token is None else tokenizer.convert_tokens_to_ids(token) for token in special
    )

    def tokens_of(text):
        return tokenizer.encode(text, add_special_tokens=False)

    packed = Packer(tokenizer, length).pack(texts)
    assert packed.dtype == np.int32
    assert packed.shape[1] == length
    assert packed.tolist() == pack_slowly(tokens_of, texts, length, start, separator)


@pytest.mark.parametrize("tokenizer", [ONE, BOTH, ONLY_BOS, ONLY_EOS, NEITHER])
def test_keeps_neither_special_tokens_nor_the_first_position(tokenizer):
    packer = Packer(tokenizer, 20)
    input_ids = torch.from_numpy(packer.pack(documents(30, longest=5))).long()
    input_ids[0, 5:7] = torch.tensor(packer.special)[[0, -1]]
    special = {tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    expected = [
        [place > 0 and token not in special for place, token in enumerate(row)]
        for row in input_ids.tolist()
    ]
    assert packer.kept(input_ids).tolist() == expected
    assert not packer.kept(input_ids)[0, 5]


def test_special_tokens_written_in_the_text_are_not_kept():
    packer = Packer(MANY, 6)
    ids = torch.from_numpy(packer.pack(["ka<a>to<b>mi ru"])).long()
    assert packer.kept(ids)[0].tolist() == [False, True, False, True, False, True]


def test_special_tokens_without_a_role_are_not_kept(tmp_path):
    # As Llama 3's reserved tokens: marked special, but not among `all_special_ids`.
    folder = tmp_path / "tokenizer"
    BOTH.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    again.add_tokens(["<reserved>"], special_tokens=True)
    assert again.convert_tokens_to_ids("<reserved>") in Packer(again, 4).special


def test_whole_and_lazy_packing_give_the_same(text_file):
    text = datasets.load_dataset("json", data_files=str(text_file))["train"].select_columns("text")
    packer = Packer(ONE, 16)
    whole = packer.pack_all(text, "text")
    assert whole.column_names == ["input_ids"]
    assert whole[:]["input_ids"].tolist() == packer.pack(text["text"]).tolist()
    streamed = list(packer.pack_lazily(text.to_iterable_dataset(), "text"))
    assert np.array_equal(np.stack(streamed), whole[:]["input_ids"])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    length=st.integers(2, 40),
    at_once=st.integers(1, 9),
    texts=st.lists(st.text(st.sampled_from("kato mi\n0é"), max_size=12), min_size=1, max_size=30),
)
def test_nothing_is_lost_between_the_documents_read_at_once(length, at_once, texts):
    packer = Packer(BOTH, length)
    expected = packer.pack(texts).tolist()
    text = datasets.Dataset.from_dict({"text": texts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", at_once)
        assert packer.pack_all(text, "text")[:]["input_ids"].tolist() == expected
        lazily = packer.pack_lazily(text.to_iterable_dataset(), "text")
        assert [context.tolist() for context in lazily] == expected


def packed_file(rank, tokenizer_folder, text_file, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if rank == 1:
        tokenizer(["ka to", "mi"], truncation=True, max_length=1)
    text = datasets.load_dataset("json", data_files=text_file)["train"].shuffle(seed=0)
    packed = Packer(tokenizer, 16).pack_all(text.select_columns(["text"]), "text")
    return packed.cache_files


def test_packed_text_is_found_again_by_another_process(text_file, tmp_path):
    """Even where the tokenizer was used before; and each process hashes strings otherwise."""
    folder, cache = str(tmp_path / "tokenizer"), tmp_path / "cache"
    BOTH.save_pretrained(folder)
    files = run_on_two(packed_file, folder, str(text_file), cache)
    assert files[0] == files[1]
    assert len(files[0]) == 1


@pytest.mark.parametrize("way", ["pack", "pack_all", "pack_lazily"])
def test_documents_that_are_no_text_are_left_out_and_told_once(monkeypatch, caplog, way):
    monkeypatch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", 3)
    texts = documents(9)
    missing = [*texts[:4], None, *texts[4:6], None, None, None, None, None, *texts[6:]]
    text = datasets.Dataset.from_dict({"text": missing})
    packer = Packer(ONE, 8)
    with caplog.at_level("INFO"):
        packed = {
            "pack": lambda: packer.pack(missing),
            "pack_all": lambda: packer.pack_all(text, "text")[:]["input_ids"],
            "pack_lazily": lambda: np.stack(list(packer.pack_lazily(text, "text"))),
        }[way]()
    assert packed.tolist() == packer.pack(texts).tolist()
    assert [record.getMessage() for record in caplog.records] == [
        "text_column holds nothing at document 4: it is left out, and so are all others like it"
    ]


@pytest.mark.parametrize("row", [3, ["a"]])
def test_rows_that_are_not_strings(monkeypatch, row):
    monkeypatch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", 2)
    message = r"^text_column holds .*, which is not a string, at document 3$"
    with pytest.raises(ValueError, match=message):
        Packer(ONE, 8).pack([*"abc", row])
    features = datasets.Features({"text": datasets.Value("int32")})
    text = datasets.Dataset.from_dict({"text": [3, 4, 5]}, features)
    with pytest.raises(ValueError, match=r"^text_column holds 3, .*, at document 0$"):
        Packer(ONE, 8).pack_all(text, "text")
