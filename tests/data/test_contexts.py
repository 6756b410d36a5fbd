import itertools

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.data.contexts import ShuffledContexts, StreamedContexts, held_out_contexts
from lightning_sae.data.packer import Packer
from tests.data.tiny import END, documents, tokenizer

LENGTH = 4
PACKER = Packer(tokenizer(END, END), 16)


def shuffled(total, seed=0):
    """Contexts that hold nothing but their number."""
    rows = np.repeat(np.arange(total, dtype=np.int32)[:, None], LENGTH, axis=1)
    packed = datasets.Dataset.from_dict({"input_ids": rows}).with_format("numpy")
    return ShuffledContexts(packed, seed, "text.txt")


def first_blocks(contexts, size, first, count):
    return list(itertools.islice(contexts.blocks(size, 1, first), count))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(total=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 3))
def test_epochs_follow_each_other_and_each_is_a_permutation(total, size, seed):
    blocks = first_blocks(shuffled(total, seed), size, 0, 8)
    assert all(block.shape == (size, LENGTH) and block.dtype == torch.int64 for block in blocks)
    numbers = torch.cat(blocks)[:, 0].tolist()
    for epoch in range(len(numbers) // total):
        assert sorted(numbers[epoch * total :][:total]) == list(range(total))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(total=st.integers(1, 12), size=st.integers(1, 15), first=st.integers(0, 6))
def test_starting_late_skips_and_changes_nothing(total, size, first):
    contexts = shuffled(total)
    expected = first_blocks(contexts, size, 0, first + 2)[first:]
    assert all(map(torch.equal, first_blocks(contexts, size, first, 2), expected))


def test_orders_differ_by_epoch_and_by_seed():
    first, second = (block[:, 0].tolist() for block in first_blocks(shuffled(20), 20, 0, 2))
    assert first != second
    assert first != list(range(20))
    assert first != first_blocks(shuffled(20, seed=1), 20, 0, 1)[0][:, 0].tolist()
    assert first == first_blocks(shuffled(20), 20, 0, 1)[0][:, 0].tolist()


def streamed(texts):
    text = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    return StreamedContexts(text, "text", PACKER, "text.txt")


@pytest.mark.parametrize("first", [0, 1, 5])
def test_streamed_contexts_repeat_in_the_order_of_the_text(first):
    texts = documents(40)
    epoch = torch.from_numpy(PACKER.pack(texts)).long()
    endless = epoch.repeat(20 * 7 // len(epoch) + 1, 1)
    blocks = first_blocks(streamed(texts), 7, first, 15)
    assert torch.equal(torch.cat(blocks), endless[first * 7 : (first + 15) * 7])


@pytest.mark.parametrize("contexts", [shuffled(3), streamed(["ka " * 50])])
def test_too_few_contexts(contexts):
    count = len(next(contexts.blocks(2, 1, 0)))
    assert count == 2
    message = r"^text='text.txt' gives only \d contexts to train on; one batch needs 10$"
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(contexts.blocks(2, 10, 0), 10))


def test_streamed_text_without_a_context():
    with pytest.raises(ValueError, match=r"^text='text.txt' gives only 0 contexts"):
        next(streamed(["ka"]).blocks(2, 1, 0))


@pytest.mark.parametrize(("validation", "test"), [(5, 7), (5, 10**6), (10**6, 5)])
def test_held_out_contexts_are_the_first_ones(validation, test, caplog):
    texts = documents(20)
    packed = torch.from_numpy(PACKER.pack(texts)).long()
    text = datasets.Dataset.from_dict({"text": texts})
    settings = {"text": "a.txt", "validation": validation, "test": test}
    with caplog.at_level("INFO"):
        parts = held_out_contexts(text, "text", PACKER, **settings)
    assert torch.equal(parts["validation"], packed[:validation])
    assert torch.equal(parts["test"], packed[validation : validation + test])
    counts = [len(parts["validation"]), len(parts["test"])]
    message = (
        f"text='a.txt' has {len(packed)} held-out contexts: {counts[0]} of {validation} to "
        f"validate on, {counts[1]} of {test} to test on"
    )
    said = [record.getMessage() for record in caplog.records]
    assert said == ([message] if validation + test > len(packed) else [])


def test_no_held_out_contexts():
    text = datasets.Dataset.from_dict({"text": ["ka"]})
    parts = held_out_contexts(text, "text", PACKER, text="", validation=1, test=1)
    assert [part.shape for part in parts.values()] == [(0, 16), (0, 16)]
