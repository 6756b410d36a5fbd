import itertools
import json

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.data.blocks import endless_blocks
from lightning_sae.data.contexts import PackedContexts, StreamedContexts
from lightning_sae.data.packer import Packer
from tests.data.tiny import END, documents, tokenizer

PACKER = Packer(tokenizer(END, END), 16)
TEXTS = documents(40)


@pytest.fixture
def expected():
    return list(torch.from_numpy(PACKER.pack(TEXTS)).long())


def same(left, right):
    assert all(each.dtype == torch.int64 for each in left)
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_packed_contexts_by_their_numbers(expected):
    text = datasets.Dataset.from_dict({"text": TEXTS})
    contexts = PackedContexts(PACKER.pack_all(text, "text"))
    assert len(contexts) == len(expected)
    assert same([contexts[number] for number in range(len(contexts))], expected)
    assert same(contexts.__getitems__([5, 0, 2]), [expected[5], expected[0], expected[2]])


@pytest.mark.parametrize("streamed", [False, True])
def test_streamed_contexts_start_afresh_each_time(expected, streamed):
    text = datasets.Dataset.from_dict({"text": TEXTS})
    contexts = StreamedContexts(text.to_iterable_dataset() if streamed else text, "text", PACKER)
    assert not hasattr(contexts, "__len__")
    assert same(list(contexts), expected)
    assert same(list(contexts), expected)


def test_streamed_text_without_a_context():
    text = datasets.Dataset.from_dict({"text": ["ka"]}).to_iterable_dataset()
    contexts = StreamedContexts(text, "text", PACKER)
    options = {"size": 2, "minimum": 1, "seed": 0, "source": "text='a'", "noun": "contexts"}
    with pytest.raises(ValueError, match=r"^text='a' gives only 0 contexts"):
        next(endless_blocks(contexts, 0, **options))


def streamed(texts, shards=1):
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=shards)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(cut=st.integers(1, 60), at_once=st.integers(1, 9), shards=st.integers(1, 3))
def test_streamed_contexts_go_on_from_any_place(cut, at_once, shards):
    expected = list(torch.from_numpy(PACKER.pack(TEXTS)).long())
    cut = min(cut, len(expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", at_once)
        begun = StreamedContexts(streamed(TEXTS, shards), "text", PACKER)
        first = list(itertools.islice(begun, cut))
        state = json.loads(json.dumps(begun.state_dict()))
        again = StreamedContexts(streamed(TEXTS, shards), "text", PACKER)
        again.load_state_dict(state)
        assert same(first + list(again), expected)
        assert same(list(again), expected)  # the next pass begins at the beginning


def test_documents_held_out_of_a_stream_do_not_move_it():
    """They are of the same data set, which knows but one place."""
    text = streamed(documents(60), shards=4)
    train, held_out = (
        StreamedContexts(part, "text", PACKER) for part in (text.skip(20), text.take(20))
    )
    alone = list(StreamedContexts(streamed(documents(60), shards=4).skip(20), "text", PACKER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", 3)
        reading = iter(train)
        found = [next(reading) for _ in range(30)]
        list(held_out)
        found += itertools.islice(reading, 5)
        train.load_state_dict(train.state_dict())
        assert same(found + list(train), alone)


def test_documents_by_number_have_no_place():
    contexts = StreamedContexts(datasets.Dataset.from_dict({"text": TEXTS}), "text", PACKER)
    assert contexts.state_dict() is None
    next(iter(contexts))
    assert contexts.state_dict() is None
