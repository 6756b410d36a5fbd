import datasets
import pytest
import torch

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
    settings = {"size": 2, "minimum": 1, "seed": 0, "source": "text='a'", "noun": "contexts"}
    with pytest.raises(ValueError, match=r"^text='a' gives only 0 contexts"):
        next(endless_blocks(contexts, 0, **settings))
